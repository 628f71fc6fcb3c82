"""Mixup of two videos, and smoothed labels."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ensemble_kit.layers.frame_preparation import dequantise, mark_frames


def smoothed(targets: Tensor, smoothing: float) -> Tensor:
    """Return ``(1 - smoothing) y + smoothing / 2``.

    The label smoothing of Szegedy et al. ("Rethinking the Inception architecture", CVPR 2016,
    section 7) for classes that each have two outcomes: a half is what one knows of neither.

    Args:
        targets: ``(B, C)`` in [0, 1], floating point.
        smoothing: In [0, 1).
    """
    return (1 - smoothing) * targets + smoothing / 2


def mixed_up(
    frames: Mapping[str, Tensor], num_frames: Tensor, targets: Tensor, alpha: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return each video mixed with another of the batch, and their targets likewise.

    Mixup (Zhang et al., ICLR 2018, section 2): ``w x_i + (1 - w) x_j`` and ``w y_i + (1 - w) y_j``
    with ``w`` from ``Beta(alpha, alpha)``, drawn for each video; j is a random permutation. Two
    departures, since videos differ in length: ``w`` is at least a half, so that video i, whose
    length and draws are kept, is the one that counts more; and a shorter video j begins again when
    it ends.

    Args:
        frames: ``(B, T, D)`` for each modality, bytes or floating point.
        num_frames: ``(B,)``, at least 1.
        targets: ``(B, C)``, floating point.
        alpha: Above 0; the smaller, the less is mixed.

    Returns:
        Frames in float32, dequantised, 0 where video i has none; and targets.
    """
    count = len(targets)
    weights = torch.distributions.Beta(alpha, alpha).sample((count,)).to(targets.device)
    weights = torch.maximum(weights, 1 - weights)
    others = torch.randperm(count, device=targets.device)
    longest = next(iter(frames.values())).shape[1]
    times = torch.arange(longest, device=targets.device)
    taken = times % num_frames[others, None]  # (B, T)
    is_frame = mark_frames(num_frames, longest).unsqueeze(-1)
    found = {}
    for name, stored in frames.items():
        own = dequantise(stored) if stored.dtype == torch.uint8 else stored
        other = own[others[:, None], taken]
        own_weights = weights[:, None, None]
        found[name] = torch.where(is_frame, own_weights * own + (1 - own_weights) * other, 0)
    rows = weights[:, None]
    return found, rows * targets + (1 - rows) * targets[others]
