"""The maximum over the frames that a repeat drew, which DBoF and gated BoF need."""

import torch
from torch import Tensor


def max_over_drawn(values: Tensor, frame_weights: Tensor) -> Tensor:
    """Return the largest value of each column over the frames that count.

    One repeat at a time: R copies of the values would be R times the memory of the widest layer.

    Args:
        values: ``(B, T, K)``, at least 0.
        frame_weights: ``(B, R, T)``; a frame counts where its weight is above 0.

    Returns:
        ``(B, R, K)``; zeros for a video of no frames.
    """
    drawn = (frame_weights > 0).to(values.dtype).unbind(dim=1)
    return torch.stack([(values * one.unsqueeze(-1)).amax(dim=1) for one in drawn], dim=1)
