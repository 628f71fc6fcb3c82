"""Average pooling: the mean of the frames (arXiv:1706.06905, table 1)."""

from torch import Tensor, nn


class AveragePooling(nn.Module):
    """The weighted mean of a set of frames: ``x = sum_t w_t f_t / sum_t w_t``.

    The frames are L2-normalised before they are averaged. The mean vector of a video-level record
    is different: it is averaged first and normalised afterwards.

    Args:
        num_features: D, the size of one frame's feature vector.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, D)``; zeros for a video of no frames.
    """

    loops_over_repeats = False

    def __init__(self, *, num_features: int) -> None:
        super().__init__()
        self.output_size = num_features
        self.projection_fan_in = num_features

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return the frames themselves."""
        return (frames,)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return the mean frame of each repeat."""
        (frames,) = described
        weights = frame_weights.to(frames.dtype)
        return weights @ frames / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)
