"""Every probability of the classes that some video has, class by class.

A metric that ranks the videos of each class looks at every probability, so nothing can be left out
as in ``table``; and it looks at one class after the other, so the probabilities lie class by class.
Classes that no video has are no part of such a metric, and are not read.

The videos of each part of a selection lie side by side, those that it chooses by first, so that a
part is a slice of each class, and all videos are one slice too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.predictions.candidates import Candidates
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.progress import progress
from ensemble_kit.selection.storage import Storage, StoredRows
from ensemble_kit.selection.table import READ_VALUES

BLOCK_VALUES = (
    2**17
)  # probabilities of a mixture ranked together: 1 MiB, which a core's cache holds


@dataclass(frozen=True, eq=False)
class ClassBlock:
    """All videos' probabilities of some neighbouring classes.

    Attributes:
        places: The places of the classes in the table.
        values: ``(M, classes * N)``, by class, then by video; float32, or float64 where some
            candidate's file has float64 numbers. In memory or on disk, see ``storage``.
    """

    places: range
    values: Floats | StoredRows

    @property
    def num_values(self) -> int:
        """How many values a candidate has: ``classes * N``."""
        return int(self.values.shape[1])


@dataclass(frozen=True, eq=False)
class ClassTable:
    """The probabilities of N videos in the C classes that some of them have.

    Attributes:
        videos: ``(N,)``, each video's place among all videos of the candidates.
        parts: The slices of these videos that are measured apart.
        blocks: The probabilities.
        hits: The videos that have each class, C ascending arrays of places in ``videos``.
    """

    videos: NDArray[np.int64]
    parts: tuple[slice, ...]
    blocks: tuple[ClassBlock, ...]
    hits: tuple[NDArray[np.int64], ...]


def read_class_table(
    known: Candidates,
    parts: Sequence[NDArray[np.bool_]],
    *,
    storage: Storage,
    block_values: int = BLOCK_VALUES,
) -> ClassTable:
    """Read every candidate, once where all of it fits in memory.

    Args:
        known: The candidates, none of which leaves out classes.
        parts: Which videos are in each part, ``(N,)`` bool; each is in one of them.
        storage: Where the table lies. What does not fit in half of its memory is read in as many
            passes as there are such halves, and lies on disk.
        block_values: About how many probabilities of a candidate are in a block.

    Raises:
        PredictionsError: A file is gone, or a value is not a probability.
        OutputError: The disk has no room for what the storage does not keep in memory.
    """
    videos = np.concatenate([np.flatnonzero(is_in) for is_in in parts])
    ends = np.cumsum([0, *(np.count_nonzero(is_in) for is_in in parts)]).tolist()
    classes, hits = _hits(known, videos)
    dtype = np.result_type(*(each.taken(videos[:1]).dtype for each in known.candidates))
    bytes_of_class = len(known.candidates) * len(videos) * dtype.itemsize
    num_bytes = len(classes) * bytes_of_class
    fits = storage.takes(num_bytes)
    if not fits:
        storage.require(num_bytes)
    step = max(1, block_values // len(videos))
    blocks_together = len(classes) if fits else storage.memory // 2 // (step * bytes_of_class)
    together = step * max(1, blocks_together)
    blocks = []
    with progress("read candidates", len(classes) * len(videos)) as shown:
        for first in range(0, len(classes), together):
            chosen = classes[first : first + together]
            values = _read(known, videos, chosen, dtype)
            for start in range(0, len(chosen), step):
                stop = min(start + step, len(chosen))
                block = values[:, start:stop].reshape(len(values), -1)
                rows = block if fits else storage.store(block)
                blocks.append(ClassBlock(range(first + start, first + stop), rows))
            shown.update((first + len(chosen)) * len(videos), "probabilities")
    slices = tuple(slice(*pair) for pair in pairwise(ends))
    return ClassTable(videos, slices, tuple(blocks), hits)


def _hits(
    known: Candidates, videos: NDArray[np.int64]
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], ...]]:
    """Return the classes that some video has, and the places of the videos that have each."""
    places = np.empty(len(videos), np.int64)
    places[videos] = np.arange(len(videos))
    owners = np.repeat(places, np.diff(known.labels.offsets))
    order = np.lexsort((owners, known.labels.classes))
    classes, starts = np.unique(known.labels.classes[order], return_index=True)
    return classes.astype(np.int64), tuple(np.split(owners[order], starts[1:]))


def _read(
    known: Candidates, videos: NDArray[np.int64], classes: NDArray[np.int64], dtype: np.dtype[Any]
) -> Floats:
    """Return every candidate's probabilities of some classes, ``(M, classes, N)``."""
    values = np.empty((len(known.candidates), len(classes), len(videos)), dtype)
    step = max(1, READ_VALUES // known.num_classes)
    for candidate, rows in zip(known.candidates, values, strict=True):
        for start in range(0, len(videos), step):
            stop = start + step
            rows[:, start:stop] = candidate.taken(videos[start:stop])[:, classes].T
    return values
