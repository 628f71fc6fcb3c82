"""Frame sampling while records are read, so that only the frames drawn are copied. NumPy only.

The counterpart of ``layers/frame_sampling.py``: the same formulas, the same float32 product, on
uniform numbers of the same kind.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.draws import uniform_numbers


class Chosen(NamedTuple):
    """The frames of one video that a batch needs.

    Attributes:
        rows: ``(T,)``, int64: which of the video's frames, counted from 0.
        weights: ``(T,)``, float32: how often each counts.
    """

    rows: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are taken, by the rules that recipes name.

    Attributes:
        name: ``random`` draws N frames with replacement, ``random_sequence`` takes N consecutive
            ones from a random start, ``uniform`` takes N at equal distances.
        num_frames: N.
        in_order: Whether the model reads the frames as a sequence, N of them in the order in which
            they were drawn; a set of frames needs each of them once, and how often it was drawn.
    """

    name: Literal["random", "random_sequence", "uniform"]
    num_frames: int
    in_order: bool

    @property
    def num_draws(self) -> int:
        """How many uniform numbers one video takes."""
        return {"random": self.num_frames, "random_sequence": 1, "uniform": 0}[self.name]

    def indices(self, draws: NDArray[np.float32], num_available: int) -> NDArray[np.int64]:
        """Return the frames drawn, in the order of the draws.

        Args:
            draws: ``num_draws`` uniform numbers in [0, 1).
            num_available: n, the frames that the video has, at least 1.

        Returns:
            ``(N,)``, in [0, n).
        """
        if self.name == "random":
            drawn = (draws * np.float32(num_available)).astype(np.int64)
        elif self.name == "random_sequence":
            last_start = max(num_available - self.num_frames, 0)
            start = min(int(draws[0] * np.float32(last_start + 1)), last_start)
            drawn = np.arange(start, start + self.num_frames)
        else:
            drawn = np.arange(self.num_frames) * num_available // self.num_frames
        return np.minimum(drawn, num_available - 1)

    def take(self, draws: NDArray[np.float32], num_available: int) -> Chosen:
        """Return the frames that a batch needs, and the weight of each.

        Of a sequence these are all N in the order of the draws, each with weight 1; of a set the
        distinct ones in the order of time, each with the number of times that it was drawn.
        """
        indices = self.indices(draws, num_available)
        if self.in_order:
            return Chosen(indices, np.ones(self.num_frames, np.float32))
        counts = np.bincount(indices)
        distinct = np.flatnonzero(counts)
        return Chosen(distinct, counts[distinct].astype(np.float32))


class Draws:
    """The uniform numbers of each video: a function of its place in training alone.

    They are the raw stream of Philox (Salmon et al., 2011) that belongs to the seed and the epoch,
    from the place on that belongs to the position. Hence no number depends on how many processes
    read, on the batch size, or on how many numbers the videos before took.

    Args:
        seed: Of the training.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Philox(key=seed % 2**64)
        self._state: Any = self._generator.state  # set again, because a new generator costs more

    def of(self, epoch: int, position: int, count: int) -> NDArray[np.float32]:
        """Return the first ``count`` numbers in [0, 1) of the video at a position of an epoch."""
        self._state["state"]["key"][1] = epoch
        self._state["state"]["counter"][1] = position
        self._generator.state = self._state
        return uniform_numbers(self._generator, count)
