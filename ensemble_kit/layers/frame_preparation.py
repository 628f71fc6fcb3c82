"""From stored features to the joint, normalised frame: done once for all members of a graph."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kit.data.encode import DEQUANTISATION_OFFSET, DEQUANTISATION_SCALE
from ensemble_kit.layers.normalisation import l2_normalise


class PreparedFrames(NamedTuple):
    """What members read: ``normalised``, or ``joint`` if the recipe says so.

    Attributes:
        joint: ``(B, T, sum of D)``, floating point: the modalities side by side, padding 0.
        normalised: The same, each joint frame of L2 norm 1, or 0.
        is_frame: ``(B, T)``, bool; False marks padding.
        stored: The frames as they were passed in, for foreign models.
    """

    joint: Tensor
    normalised: Tensor
    is_frame: Tensor
    stored: Mapping[str, Tensor]


def dequantise(stored: Tensor) -> Tensor:
    """Return the features that bytes stand for: ``q * 4/255 + (4/512 - 2)``.

    The formula of the starter code (google/youtube-8m, ``utils.Dequantize``). Its results lie 4/512
    above the inverse of the encoder. 0 becomes -1.9921875 and 255 becomes 2.0078125.

    Args:
        stored: uint8, any shape.

    Returns:
        float32, the same shape.
    """
    return stored.to(torch.float32) * DEQUANTISATION_SCALE + DEQUANTISATION_OFFSET


def quantise(features: Tensor) -> Tensor:
    """Return the bytes from which ``dequantise`` made these features, as whole float32 numbers."""
    return ((features - DEQUANTISATION_OFFSET) / DEQUANTISATION_SCALE).round().clamp(0, 255)


def mark_frames(num_frames: Tensor, padded_length: int) -> Tensor:
    """Return ``(B, T)`` bools: True for a video's own frames, False for padding."""
    positions = torch.arange(padded_length, device=num_frames.device)
    return positions < num_frames.unsqueeze(1)


def prepare_frames(frames: Mapping[str, Tensor], num_frames: Tensor) -> PreparedFrames:
    """Dequantise, join the modalities and L2-normalise each joint frame.

    The starter code does the same before every model. Padding is 0 *after* dequantisation, and the
    length that becomes 1 is that of the joint vector (1,152 features in YouTube-8M), not that of
    each modality.

    Args:
        frames: ``(B, T, D)`` for each modality, in the schema's order; uint8 is dequantised.
        num_frames: ``(B,)``, integers; frames from there on are padding.
    """
    values = [
        dequantise(stored) if stored.dtype == torch.uint8 else stored for stored in frames.values()
    ]
    joint = values[0] if len(values) == 1 else torch.cat(values, dim=-1)
    is_frame = mark_frames(num_frames, joint.shape[1])
    # where, not a product: a padded NaN must not become a feature
    joint = torch.where(is_frame.unsqueeze(-1), joint, torch.zeros((), dtype=joint.dtype))
    return PreparedFrames(joint, l2_normalise(joint), is_frame, frames)
