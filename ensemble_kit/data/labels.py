"""The labels of many videos as two arrays."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class LabelLists(NamedTuple):
    """The class indices of N videos, one list after the other (compressed sparse rows).

    Attributes:
        offsets: ``(N + 1,)``, int64; video i has ``classes[offsets[i]:offsets[i + 1]]``.
        classes: ``(offsets[-1],)``, int64; sorted within a video, each class once.
    """

    offsets: NDArray[np.int64]
    classes: NDArray[np.int64]

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int] | NDArray[np.int64]]) -> "LabelLists":
        """Join the class indices of each video; they are sorted, and repeats are dropped."""
        rows = [sorted(set(map(int, row))) for row in lists]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        classes = np.fromiter((index for row in rows for index in row), np.int64, offsets[-1])
        return cls(offsets, classes)

    @property
    def num_videos(self) -> int:
        """N; ``len`` of a named tuple would count its fields."""
        return len(self.offsets) - 1

    def dense(self, num_classes: int) -> NDArray[np.bool_]:
        """Return the labels as ``(N, C)``, bool."""
        labels = np.zeros((self.num_videos, num_classes), bool)
        labels[np.repeat(np.arange(self.num_videos), np.diff(self.offsets)), self.classes] = True
        return labels

    def rows(self, start: int, stop: int) -> "LabelLists":
        """Return the labels of videos ``start`` to ``stop - 1``, with offsets from 0 again."""
        offsets = self.offsets[start : stop + 1]
        return LabelLists(offsets - offsets[0], self.classes[offsets[0] : offsets[-1]])
