"""Where the probabilities of a predictions file lie: all of them, or the best of each video.

Whatever holds them, ``read`` returns dense rows of the videos at some places in the file, with
``-inf`` where a class is not listed, and whether all of them are known to be from 0 to 1.
``bounds`` is ``(N,)``, what no class that is not listed can exceed, or None where every class is
listed.

Rows are float64 where the file has float64 numbers or text, and float32 elsewhere. Rounding
float64 to float32 would be smaller and faster, but it makes ties of scores that differ, and GAP
then ranks them by class index: a file whose scores lie within 1e-8 of one another could lose half
its GAP without a word.
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
ONE_AS_BITS = {4: 0x3F80_0000, 8: 0x3FF0_0000_0000_0000}  # of float32 and of float64
Floats: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class DenseRows:
    """Every probability of every video, in a file or in memory."""

    matrix: RowFile | NDArray[Any]
    bounds: None = None

    def read(self, places: NDArray[np.int64], num_classes: int) -> tuple[Floats, bool]:
        """Return the rows of some videos; they have ``num_classes`` columns already."""
        rows = self.matrix.read(places) if isinstance(self.matrix, RowFile) else self.matrix[places]
        is_double = rows.dtype.itemsize == np.dtype(np.float64).itemsize
        return rows.astype(np.float64 if is_double else np.float32, copy=False), False


@dataclass(frozen=True)
class ListedRows:
    """What a CSV file lists: any number of classes of each video, its best ones."""

    pairs: Pairs

    @property
    def bounds(self) -> NDArray[np.float64]:
        """The lowest confidence that a video lists, for the file lists its best; 1 with none."""
        offsets, _, confidences = self.pairs
        bounds = np.ones(len(offsets) - 1)
        has_pairs = np.diff(offsets) > 0
        if has_pairs.any():
            bounds[has_pairs] = np.minimum.reduceat(confidences, offsets[:-1][has_pairs])
        return bounds

    def read(self, places: NDArray[np.int64], num_classes: int) -> tuple[Floats, bool]:
        """Return the rows of some videos; ``-inf`` where a class is not listed."""
        offsets, classes, confidences = self.pairs
        counts = np.diff(offsets)[places]
        ends = np.cumsum(counts)
        pairs = np.arange(counts.sum()) + np.repeat(offsets[places] - ends + counts, counts)
        rows = np.full((len(places), num_classes), -np.inf)
        rows[np.repeat(np.arange(len(places)), counts), classes[pairs]] = confidences[pairs]
        return rows, True  # confidences were compared with 0 and 1 when their lines were read


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

    def read(self, places: NDArray[np.int64], num_classes: int) -> tuple[Floats, bool]:
        """Return the rows of some videos; ``-inf`` where a class was not kept."""
        rows = np.full((len(places), num_classes), -np.inf, np.float32)
        classes = self.classes.read(places)
        if classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
            raise PredictionsError(
                f"{self.classes.path} lists a class outside of its {num_classes} classes.",
                hint="Make the file again with `ensemble-kit predict`.",
            )
        values = self.values.read(places)
        np.put_along_axis(rows, classes, values, axis=1)
        return rows, are_probabilities(values)  # far fewer than the rows have


@dataclass(frozen=True)
class JoinedRows:
    """The probabilities of several files of the kit, one after the other.

    Attributes:
        parts: What each file holds; all of them every class, or as many of the best.
        starts: ``(len(parts) + 1,)``, int64: the first video of each, and the number of all.
    """

    parts: "tuple[Rows, ...]"
    starts: NDArray[np.int64]

    @property
    def bounds(self) -> NDArray[np.floating[Any]] | None:
        """The bounds of all files, or None where every class is listed."""
        bounds = [part.bounds for part in self.parts if part.bounds is not None]
        return np.concatenate(bounds) if bounds else None

    def read(self, places: NDArray[np.int64], num_classes: int) -> tuple[Floats, bool]:
        """Return the rows of some videos, each from its file."""
        of = np.searchsorted(self.starts, places, side="right") - 1
        rows = np.empty((len(places), num_classes), np.float32)
        are_probabilities = True
        for number in np.unique(of).tolist():
            mine = of == number
            rows[mine], are_known = self.parts[number].read(
                places[mine] - self.starts[number], num_classes
            )
            are_probabilities &= are_known
        return rows, are_probabilities


Rows: TypeAlias = DenseRows | ListedRows | TopRows | JoinedRows


def are_probabilities(values: Floats) -> bool:
    """Return whether all values are from 0 to 1; NaN is not.

    Their bits tell in one pass: as an integer without a sign, that of 1 is the largest of these.
    """
    if not values.size:
        return True
    if values.dtype.isnative and values.dtype.itemsize in ONE_AS_BITS:
        bits = values.view(f"u{values.dtype.itemsize}")
        if bits.max() <= ONE_AS_BITS[values.dtype.itemsize]:
            return True
    return bool(values.min() >= 0 and values.max() <= 1)  # -0.0 is one too


def as_probabilities(rows: Floats, ids: Sequence[str], path: Path | str) -> Floats:
    """Return rows as probabilities: what rounding put outside of ``[0, 1]`` becomes 0 or 1.

    Args:
        rows: ``(n, C)``; ``-inf`` where a class is not listed.
        ids: The rows' videos.
        path: The file, or what messages call it.

    Raises:
        PredictionsError: A value is NaN or infinite, or more than 1e-6 outside.
    """
    if are_probabilities(rows):
        return rows
    is_listed = rows != -np.inf
    is_wrong = is_listed & ~((rows >= -SLACK) & (rows <= 1 + SLACK))
    if is_wrong.any():
        video, index = np.argwhere(is_wrong)[0]
        value = rows[video, index]
        where = f"{path}: class {index} of video {ids[video]!r} is"
        if not np.isfinite(value):
            raise PredictionsError(
                f"{where} {'not a number (NaN)' if np.isnan(value) else 'infinite'}.",
                hint="Predict again with a model whose weights and features are finite.",
            )
        raise PredictionsError(
            f"{where} {value:g}, expected a probability from 0 to 1.",
            hint="Predict again with a model that returns probabilities, not logits.",
        )
    return np.where(is_listed, np.clip(rows, 0, 1), rows)
