"""The maximum over the frames that one repeat drew, for DBoF and gated BoF."""

import torch
from torch import Tensor


def max_over_drawn(values: Tensor, frame_weights: Tensor) -> Tensor:
    """Return the largest value of each column over the frames that count.

    Repeats are computed one at a time, because R copies of the values would take R times the memory
    of the widest layer.

    Args:
        values: ``(B, T, K)``, none below 0.
        frame_weights: ``(B, R, T)``; a frame counts where its weight is above 0.

    Returns:
        ``(B, R, K)``; zeros for a video of no frames.
    """
    drawn = (frame_weights > 0).to(values.dtype).unbind(dim=1)
    return torch.stack([(values * counts.unsqueeze(-1)).amax(dim=1) for counts in drawn], dim=1)
