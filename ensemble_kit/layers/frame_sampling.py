"""Frame sampling as a weighting: how often each frame of a video is drawn.

An order-free pooling sees a set of frames and a weight for each, so a draw with replacement needs
no copies, and R repeats are R weight vectors over the same frames.
"""

import torch
from torch import Tensor, nn

from ensemble_kit.draws import draw_numbers


def draw_table(name: str, *, repeats: int, num_frames: int) -> Tensor:
    """Return ``draws.draw_numbers`` as a tensor: ``(R, N)``, float32 in [0, 1)."""
    return torch.from_numpy(draw_numbers(name, repeats=repeats, num_frames=num_frames))


def count_draws(indices: Tensor, is_frame: Tensor) -> Tensor:
    """Count how often each frame was drawn.

    Args:
        indices: ``(B, R, N)``, int64 in [0, T).
        is_frame: ``(B, T)``, bool; padding is never counted, not even in a video of no frames.

    Returns:
        ``(B, R, T)``, float32.
    """
    shape = indices.shape[0], indices.shape[1], is_frame.shape[1]
    counts = torch.zeros(shape, dtype=torch.float32, device=indices.device)
    counts = counts.scatter_add(2, indices, torch.ones_like(indices, dtype=torch.float32))
    return counts * is_frame.unsqueeze(1).to(torch.float32)


class RandomSampling(nn.Module):
    """Draw N frames with replacement: ``idx = floor(u * n)``, in float32, at most ``n - 1``.

    The default sampler of S2 and S5 (google/youtube-8m, ``SampleRandomFrames``), used in training
    and in inference.

    Args:
        num_frames: N, the number of draws.

    Shape:
        - is_frame: ``(B, T)``, bool; a video's own frames come first.
        - draws: uniform numbers in [0, 1): ``(B, R, N)``, or ``(R, N)`` for all videos alike;
          None draws new ones, ``(B, 1, N)``.
        - output: frame weights ``(B, R, T)``, float32, each row's sum N, or 0 with no frame.
    """

    def __init__(self, *, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.num_draws: int | None = num_frames

    def forward(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return how often each frame counts in each repeat."""
        return count_draws(self.indices(is_frame, draws), is_frame)

    def indices(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the frames drawn, in the order of the draws: ``(B, R, N)``, int64."""
        draws = _drawn(draws, self.num_frames, is_frame)
        lengths = is_frame.sum(dim=1).reshape(-1, 1, 1)
        indices = (draws * lengths.to(torch.float32)).to(torch.int64)
        return torch.minimum(indices, (lengths - 1).clamp_min(0))


class SequenceSampling(nn.Module):
    """Take N consecutive frames from a random start; the last one is repeated where n < N.

    ``start = floor(u * (max(n - N, 0) + 1))``, ``idx_i = min(start + i, n - 1)``:
    google/youtube-8m, ``SampleRandomSequence``.

    Args:
        num_frames: N, the number of frames taken.

    Shape:
        - is_frame: ``(B, T)``, bool.
        - draws: one uniform number in [0, 1) for each repeat: ``(B, R, 1)``, or ``(R, 1)`` for all
          videos alike; None draws new ones, ``(B, 1, 1)``.
        - output: frame weights ``(B, R, T)``, float32.
    """

    def __init__(self, *, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.num_draws: int | None = 1

    def forward(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return how often each frame counts in each repeat."""
        return count_draws(self.indices(is_frame, draws), is_frame)

    def indices(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the frames taken, in order: ``(B, R, N)``, int64."""
        draws = _drawn(draws, 1, is_frame)
        lengths = is_frame.sum(dim=1).reshape(-1, 1, 1)
        last_start = (lengths - self.num_frames).clamp_min(0)
        starts = (draws * (last_start + 1).to(torch.float32)).to(torch.int64)
        steps = torch.arange(self.num_frames, device=is_frame.device)
        indices = torch.minimum(starts, last_start) + steps
        return torch.minimum(indices, (lengths - 1).clamp_min(0))


class UniformSampling(nn.Module):
    """Take N frames at equal distances: ``idx_i = floor(i * n / N)``, repeated where n < N.

    S4's sampler (pomonam/LearnablePoolingMethods), but computed in integers, so that rounding of
    ``i / N`` cannot move an index.

    Args:
        num_frames: N, the number of frames taken.

    Shape:
        - is_frame: ``(B, T)``, bool.
        - output: frame weights ``(B, 1, T)``, float32.
    """

    def __init__(self, *, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.num_draws: int | None = None

    def forward(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return how often each frame counts; ``draws`` is not needed."""
        return count_draws(self.indices(is_frame, draws), is_frame)

    def indices(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the frames taken, in order: ``(B, 1, N)``, int64; ``draws`` is not needed."""
        steps = torch.arange(self.num_frames, device=is_frame.device)
        lengths = is_frame.sum(dim=1).reshape(-1, 1, 1)
        return torch.div(steps * lengths, self.num_frames, rounding_mode="floor")


class AllFrames(nn.Module):
    """Take every frame once.

    Shape:
        - is_frame: ``(B, T)``, bool.
        - output: frame weights ``(B, 1, T)``, float32: 1 for a frame, 0 for padding.
    """

    num_frames: int | None = None
    num_draws: int | None = None

    def forward(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return weight 1 for every frame; ``draws`` is not needed."""
        return is_frame.unsqueeze(1).to(torch.float32)

    def indices(self, is_frame: Tensor, draws: Tensor | None = None) -> None:
        """Return None: the frames are read as they are."""


def _drawn(draws: Tensor | None, count: int, is_frame: Tensor) -> Tensor:
    if draws is None:
        return torch.rand(is_frame.shape[0], 1, count, device=is_frame.device)
    return draws
