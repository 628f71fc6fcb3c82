"""Where the probabilities of a predictions file are: all of them, or the best of each video.

Whatever holds them, they are asked for by place, and come as dense rows of float32 with ``-inf``
where a class is not listed; ``bounds`` is ``(N,)``, what no class that is not listed can exceed, or
None where all are. Imports ``challenge_csv``, ``row_files`` and NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.errors import PredictionsError
from ensemble_kit.predictions.challenge_csv import Pairs
from ensemble_kit.store.row_files import RowFile

SLACK = 1e-6  # a float32 mixture of probabilities may end this far outside [0, 1]


@dataclass(frozen=True)
class DenseRows:
    """Every probability of every video, in a file or in memory."""

    matrix: RowFile | NDArray[Any]
    bounds: None = None

    def read(self, places: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
        """Return the rows of some videos; they have ``num_classes`` columns anyway."""
        rows = self.matrix.read(places) if isinstance(self.matrix, RowFile) else self.matrix[places]
        return rows.astype(np.float32, copy=False)


@dataclass(frozen=True)
class ListedRows:
    """What a CSV file lists: of each video any number of classes, its best ones."""

    pairs: Pairs

    @property
    def bounds(self) -> NDArray[np.float32]:
        """The lowest confidence that a video lists, for the file lists its best; 1 with none."""
        offsets, _, confidences = self.pairs
        bounds = np.ones(len(offsets) - 1, np.float32)
        lists = np.diff(offsets) > 0
        if lists.any():
            bounds[lists] = np.minimum.reduceat(confidences, offsets[:-1][lists])
        return bounds

    def read(self, places: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
        """Return the rows of some videos; ``-inf`` where a class is not listed."""
        offsets, classes, confidences = self.pairs
        counts = np.diff(offsets)[places]
        ends = np.cumsum(counts)
        listed = np.arange(counts.sum()) + np.repeat(offsets[places] - ends + counts, counts)
        rows = np.full((len(places), num_classes), -np.inf, np.float32)
        rows[np.repeat(np.arange(len(places)), counts), classes[listed]] = confidences[listed]
        return rows


@dataclass(frozen=True)
class TopRows:
    """The K best classes of each video, of a file that keeps no more.

    Attributes:
        values: ``(N, K)``.
        classes: ``(N, K)``, int32.
        bounds: ``(N,)``, the largest probability that was not kept.
    """

    values: RowFile
    classes: RowFile
    bounds: NDArray[np.float32]

    def read(self, places: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
        """Return the rows of some videos; ``-inf`` where a class was not kept."""
        rows = np.full((len(places), num_classes), -np.inf, np.float32)
        classes = self.classes.read(places)
        if classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
            raise PredictionsError(
                f"{self.classes.path} lists a class outside of its {num_classes} classes.",
                hint="Make the file again with `ensemble-kit predict`.",
            )
        np.put_along_axis(rows, classes, self.values.read(places), axis=1)
        return rows


Rows: TypeAlias = DenseRows | ListedRows | TopRows


def as_probabilities(
    rows: NDArray[np.floating[Any]], ids: Sequence[str], path: Path
) -> NDArray[np.floating[Any]]:
    """Return rows as probabilities: what rounding put outside of ``[0, 1]`` becomes 0 or 1.

    Args:
        rows: ``(n, C)``; ``-inf`` where a class is not listed.
        ids: The rows' videos.
        path: The file, for the message.

    Raises:
        PredictionsError: A value is NaN, or 1e-6 or more outside.
    """
    if not rows.size or (rows.min() >= 0 and rows.max() <= 1):  # False with NaN
        return rows
    is_listed = rows != -np.inf
    is_wrong = is_listed & ~((rows >= -SLACK) & (rows <= 1 + SLACK))
    if is_wrong.any():
        video, index = np.argwhere(is_wrong)[0]
        raise PredictionsError(
            f"{path}: class {index} of video {ids[video]!r} is {rows[video, index]:g}, expected a "
            "probability from 0 to 1.",
            hint="Predict again with a model that returns probabilities, not logits.",
        )
    return np.where(is_listed, np.clip(rows, 0, 1), rows)
