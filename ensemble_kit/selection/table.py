"""What can matter of many candidates' probabilities, small enough to be held and ranked quickly.

Of each video only the classes that some candidate ranks high are kept, with the exact probability
of every candidate there; and for each candidate a bound that its other probabilities do not exceed.
A mixture whose k-th best score is above the mixed bounds has its k best classes in the table: no
other class can be among them (Fagin's threshold argument). The few videos where that cannot be said
are ranked from the candidates' own rows; see ``scoring``.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import group_maxima
from ensemble_kit.predictions.candidates import Candidate, Candidates
from ensemble_kit.progress import progress

NUM_THREADS = os.cpu_count() or 1
READ_VALUES = 2**18  # probabilities of a candidate read together: 1 MiB, which a core's cache holds
BLOCK_VIDEOS = 256  # videos ranked together: some 100 pairs of each, which a core's cache holds


@dataclass(frozen=True, eq=False)
class Block:
    """The pairs of video and class that are kept of some videos, P of them, by video, then class.

    Every array over pairs ends with one more place, for the ragged ends of padded rows.

    Attributes:
        start: The first video's place in the table.
        offsets: ``(n + 1,)``; video i has the pairs ``offsets[i]`` to ``offsets[i + 1]``.
        classes: ``(P + 1,)``, int32.
        is_hit: ``(P + 1,)``, bool, whether the class is a label of the video.
        values: ``(M, P + 1)``, float32; 0 where a candidate does not list the class.
        is_listed: ``(M, P + 1)``, bool; None where every candidate lists every class.
    """

    start: int
    offsets: NDArray[np.int64]
    classes: NDArray[np.int32]
    is_hit: NDArray[np.bool_]
    values: NDArray[np.float32]
    is_listed: NDArray[np.bool_] | None

    @property
    def num_videos(self) -> int:
        """How many videos the block has."""
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class Table:
    """The kept pairs of N videos.

    Attributes:
        candidates: The M candidates, in their order everywhere.
        videos: ``(N,)``, each video's place among all that the candidates were read of.
        blocks: The pairs.
        bounds: ``(M, N)``, float64: no probability outside of the table exceeds it.
        is_flat: ``(M, N)``, bool: all probabilities outside are equal to the bound, and the k
            lowest of those classes are in the table, so that no other can win a tie.
        is_whole: ``(N,)``, bool: all classes of the video are in the table.
        lists_all: ``(M,)``, bool: whether a candidate lists every class of every video.
        num_positives: Labels of all the videos.
        num_classes: C.
    """

    candidates: tuple[Candidate, ...]
    videos: NDArray[np.int64]
    blocks: tuple[Block, ...]
    bounds: NDArray[np.float64]
    is_flat: NDArray[np.bool_]
    is_whole: NDArray[np.bool_]
    lists_all: NDArray[np.bool_]
    num_positives: int
    num_classes: int

    @property
    def num_videos(self) -> int:
        """N."""
        return len(self.videos)

    def left_out_bounds(self, candidate: int) -> NDArray[np.float64]:
        """Return what no class that a candidate leaves out of a video can exceed, ``(N,)``."""
        one = self.candidates[candidate]
        bounds = one.predictions.source.bounds
        if bounds is None:
            return np.zeros(self.num_videos)
        return bounds[one.places[self.videos]].astype(np.float64)


def read_tables(
    known: Candidates, parts: Sequence[NDArray[np.bool_]], *, k: int, depth: int | None = None
) -> list[Table]:
    """Read every candidate once and return a table of each part of the videos.

    Args:
        known: The candidates.
        parts: Which videos are in each table, ``(N,)`` bool.
        k: The most classes of a video that will be ranked.
        depth: About how many of a candidate's best classes are kept; None takes twice ``k``. With
            half as many again as ``k``, one video in forty needed its candidates' own rows, again
            for every mixture, and that was nine tenths of a search.

    Raises:
        PredictionsError: A file has gone, or a value is not a probability.
    """
    depth = depth or 2 * k
    step = max(1, READ_VALUES // known.num_classes)
    builders = [_Builder(known, np.flatnonzero(is_in)) for is_in in parts]
    starts = range(0, len(known.ids), step)

    def read(start: int) -> _Piece:
        return _read(known, start, min(start + step, len(known.ids)), k, depth)

    with (
        progress("read candidates", len(known.ids)) as shown,
        ThreadPoolExecutor(NUM_THREADS) as threads,
    ):
        for start, piece in zip(starts, threads.map(read, starts), strict=True):
            stop = min(start + step, len(known.ids))
            for is_in, builder in zip(parts, builders, strict=True):
                builder.add(piece.taken(is_in[start:stop]))
            shown.update(stop, "videos")
    return [builder.table() for builder in builders]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A few videos' part of a table; ``counts`` are their numbers of pairs."""

    counts: NDArray[np.int64]
    classes: NDArray[np.int32]
    is_hit: NDArray[np.bool_]
    values: NDArray[np.float32]
    is_listed: NDArray[np.bool_] | None
    bounds: NDArray[np.float64]
    is_flat: NDArray[np.bool_]

    def taken(self, is_in: NDArray[np.bool_]) -> "_Piece":
        if is_in.all():
            return self
        pairs = np.flatnonzero(np.repeat(is_in, self.counts))
        return _Piece(
            self.counts[is_in],
            self.classes[pairs],
            self.is_hit[pairs],
            self.values[:, pairs],
            None if self.is_listed is None else self.is_listed[:, pairs],
            self.bounds[:, is_in],
            self.is_flat[:, is_in],
        )


def _read(known: Candidates, start: int, stop: int, k: int, depth: int) -> _Piece:
    """Read some videos of every candidate, and keep what can matter of them."""
    raw = [one.taken(np.arange(start, stop)) for one in known.candidates]
    rows = [
        np.maximum(block, 0) if one.predictions.is_sparse else block
        for one, block in zip(known.candidates, raw, strict=True)
    ]
    is_hit = known.labels.rows(start, stop).dense(known.num_classes)
    keeps = is_hit.copy()
    bounds = np.empty((len(rows), stop - start), np.float32)
    is_flat = np.empty(bounds.shape, np.bool_)
    for index, block in enumerate(rows):
        bounds[index], is_flat[index] = _bounds(block, depth)
        keeps |= block > bounds[index][:, None]
        if known.candidates[index].predictions.is_sparse:  # listed as 0 is not the same as missing
            keeps |= (raw[index] == 0) & (bounds[index] == 0)[:, None]
    some_flat = np.flatnonzero(is_flat.any(axis=0))
    if some_flat.size:  # of equal scores the lowest classes rank first, so the k lowest are enough
        left_out = ~keeps[some_flat]
        keeps[some_flat] |= left_out & (np.cumsum(left_out, axis=1) <= k)
    counts = np.count_nonzero(keeps, axis=1)
    pairs = np.flatnonzero(keeps)
    values = np.stack([block.reshape(-1)[pairs] for block in rows])
    is_sparse = any(one.predictions.is_sparse for one in known.candidates)
    return _Piece(
        counts,
        (pairs % known.num_classes).astype(np.int32),
        is_hit.reshape(-1)[pairs],
        values,
        np.stack([block.reshape(-1)[pairs] > -np.inf for block in raw]) if is_sparse else None,
        bounds.astype(np.float64),
        is_flat,
    )


def _bounds(rows: NDArray[np.float32], depth: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return what all but about ``depth`` values of a row do not exceed, and where they equal it.

    The classes are dealt into groups; the bound is the ``depth``-th best group maximum, which at
    most a few more than ``depth`` values are above.
    """
    maxima = group_maxima(rows, num_groups=max(6 * depth, isqrt(rows.shape[1])))
    place = max(maxima.shape[1] - depth, 0)
    maxima.partition(place, axis=1)
    bounds = maxima[:, place]
    is_flat = maxima.min(axis=1) == bounds  # a group may hide lower values
    is_flat[is_flat] = rows[is_flat].min(axis=1) == bounds[is_flat]
    return bounds, is_flat


class _Builder:
    """Joins pieces into the blocks of one table."""

    def __init__(self, known: Candidates, videos: NDArray[np.int64]) -> None:
        self.known = known
        self.videos = videos
        self.blocks: list[Block] = []
        self.bounds: list[NDArray[np.float64]] = []
        self.is_flat: list[NDArray[np.bool_]] = []
        self.waiting: list[_Piece] = []

    def add(self, piece: _Piece) -> None:
        self.waiting.append(piece)
        if sum(len(one.counts) for one in self.waiting) >= BLOCK_VIDEOS:
            self._join()

    def table(self) -> Table:
        if self.waiting:
            self._join()
        candidates = self.known.candidates
        counts = np.concatenate([np.diff(block.offsets) for block in self.blocks])
        return Table(
            candidates,
            self.videos,
            tuple(self.blocks),
            np.concatenate(self.bounds, axis=1),
            np.concatenate(self.is_flat, axis=1),
            counts == self.known.num_classes,
            np.array([not one.predictions.is_sparse for one in candidates]),
            int(np.diff(self.known.labels.offsets)[self.videos].sum()),
            self.known.num_classes,
        )

    def _join(self) -> None:
        pieces, self.waiting = self.waiting, []
        is_listed = [one.is_listed for one in pieces if one.is_listed is not None]
        self.bounds += [one.bounds for one in pieces]
        self.is_flat += [one.is_flat for one in pieces]
        self.blocks.append(
            Block(
                start=sum(block.num_videos for block in self.blocks),
                offsets=np.cumsum(np.concatenate([[0], *(one.counts for one in pieces)])),
                classes=_joined([one.classes for one in pieces]),
                is_hit=_joined([one.is_hit for one in pieces]),
                values=_joined([one.values for one in pieces]),
                is_listed=_joined(is_listed) if is_listed else None,
            )
        )


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays over pairs one after the other, with one more place of zeros."""
    end = np.zeros((*parts[0].shape[:-1], 1), parts[0].dtype)
    return np.concatenate([*parts, end], axis=-1)
