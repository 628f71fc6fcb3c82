"""What can matter of many candidates' probabilities, small enough to be held and ranked quickly.

GAP@k looks at the k best classes of each video, so nearly all of a video's 3,862 probabilities can
never matter. The table keeps of each video the classes that some candidate ranks high, with the
exact probability of every candidate there, and for each candidate a bound that its other
probabilities do not exceed.

That this is enough is the threshold argument of Fagin, Lotem and Naor ("Optimal aggregation
algorithms for middleware", PODS 2001, section 4): a weighted sum rises with each of its terms, so
no class outside of the table scores more than the weighted sum of the bounds. Where a mixture's
k-th best score in the table is above that, its k best classes are in the table. The few videos
where it is not are ranked from the candidates' own rows; see ``scoring``. So nothing is estimated.

Why not hold all probabilities: 25 candidates of 20,000 videos and 3,862 classes are 7.7 GB, which
every one of hundreds of evaluations would have to read again. Why not their threshold algorithm,
which goes down all lists one class at a time until the bound holds: it looks at fewer classes, but
its depth differs from video to video and from mixture to mixture, which would be a loop in Python
for each. A fixed depth is one pass of NumPy over each row, made once, and serves every mixture.

Why deeper for some: where files keep some 50 classes of each video, the k-th best class of a mean
is often missing from several of them, and its score falls below the bounds' sum. At 45 classes one
video in eighty had to be ranked from whole rows, which took three quarters of each evaluation. So
all classes are kept that such files list, and where the mean of all candidates proves a video with
little to spare, or not, more is kept of it.

Layout: pairs of video and class lie video by video in blocks of some 1,024 videos, with one row of
values for each candidate. A block of 256 would lie in a core's own cache, but then threads wait for
each other: what Python does for a block takes as long for few videos as for many, and only NumPy's
part runs side by side. On two cores a search took 9.2 s with 256 and 6.8 s with 1,024 or 2,048.
"""

import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import group_maxima
from ensemble_kit.predictions.candidates import Candidate, Candidates
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.progress import progress
from ensemble_kit.selection.storage import Rows, Storage, StoredRows

NUM_THREADS = os.cpu_count() or 1
READ_VALUES = 2**18  # probabilities of a candidate read together: 1 MiB, which a core's cache holds
BLOCK_VIDEOS = 1024  # videos ranked together
DEEPER = 3  # times as deep is a video read that the first depth would probably not prove
FEW = 1.5  # times as many classes as the depth; all are kept where a file lists no more of a video
MARGIN = 1.2  # of the mean's k-th best score over the bound, from which on a video is proved
BOUND_BYTES = 9  # of a candidate's bound of a video, and whether it is flat
SCORER_BYTES = 24  # of a pair that a scorer keeps beside its values: sums, the least and the most


@dataclass(frozen=True, eq=False)
class Block:
    """The P pairs of video and class that are kept of some videos, by video, then by class.

    Every row over pairs has one more place at its end, which pads rows of different lengths. Rows
    lie in memory or on disk, see ``storage``; either way ``values[i]`` is that of candidate i.

    Attributes:
        start: The first video's place in the table.
        offsets: ``(n + 1,)``; video i has the pairs ``offsets[i]`` to ``offsets[i + 1]``.
        class_row: ``(1, P + 1)``, int32.
        hit_row: ``(1, P + 1)``, bool, whether the class is a label of the video.
        values: ``(M, P + 1)``, 0 where a candidate does not list the class; float32, or float64
            where some candidate's file has float64 numbers or text.
        is_listed: ``(M, P + 1)``, bool; None where every candidate lists every class.
    """

    start: int
    offsets: NDArray[np.int64]
    class_row: Rows
    hit_row: Rows
    values: Rows
    is_listed: Rows | None

    @property
    def num_videos(self) -> int:
        """How many videos the block has."""
        return len(self.offsets) - 1

    @property
    def num_pairs(self) -> int:
        """P."""
        return int(self.offsets[-1])

    @property
    def classes(self) -> NDArray[np.int32]:
        """The class of each pair, ``(P + 1,)``."""
        return self.class_row[0]

    @property
    def is_hit(self) -> NDArray[np.bool_]:
        """Whether each pair's class is a label of its video, ``(P + 1,)``."""
        return self.hit_row[0]

    @property
    def is_stored(self) -> bool:
        """Whether its rows lie on disk."""
        return isinstance(self.values, StoredRows)

    def taken(self, candidates: Collection[int]) -> "Block":
        """Return the block with the values of some candidates in memory."""
        if not isinstance(self.values, StoredRows):
            return self
        return replace(self, values=self.values.taken(candidates))


@dataclass(frozen=True, eq=False)
class Table:
    """The kept pairs of N videos.

    Attributes:
        candidates: The M candidates, in their order everywhere.
        videos: ``(N,)``, each video's place among all videos of the candidates.
        blocks: The pairs.
        bounds: ``(M, N)``, float64; no probability outside of the table exceeds it.
        is_flat: ``(M, N)``, bool; whether all probabilities outside are equal to the bound, and the
            k lowest of those classes are in the table, so that no other can win a tie.
        is_whole: ``(N,)``, bool; whether all C classes of the video are in the table.
        has_gaps: Whether there are classes beside these C, which no file and no label names.
        lists_all: ``(M,)``, bool; whether a candidate lists every class of every video.
        positives: ``(N,)``, the number of labels of each video.
        num_classes: C.
    """

    candidates: tuple[Candidate, ...]
    videos: NDArray[np.int64]
    blocks: tuple[Block, ...]
    bounds: NDArray[np.float64]
    is_flat: NDArray[np.bool_]
    is_whole: NDArray[np.bool_]
    has_gaps: bool
    lists_all: NDArray[np.bool_]
    positives: NDArray[np.int64]
    num_classes: int

    @property
    def num_videos(self) -> int:
        """The number of videos, N."""
        return len(self.videos)

    @property
    def num_positives(self) -> int:
        """The number of labels of all the videos."""
        return int(self.positives.sum())

    def left_out_bounds(self, candidate: int) -> NDArray[np.float64]:
        """Return what no class that a candidate's file leaves out can exceed, ``(N,)``."""
        bounds = self.candidates[candidate].predictions.source.bounds
        if bounds is None:
            return np.zeros(self.num_videos)
        places = self.candidates[candidate].places[self.videos]
        return bounds[places].astype(np.float64)


def read_tables(
    known: Candidates,
    parts: Sequence[NDArray[np.bool_]],
    *,
    k: int,
    depth: int | None = None,
    storage: Storage | None = None,
    read_values: int = READ_VALUES,
    block_videos: int = BLOCK_VIDEOS,
) -> list[Table]:
    """Read every candidate once and return a table of each part of the videos.

    Args:
        known: The candidates.
        parts: Which videos are in each table, ``(N,)`` bool.
        k: The most classes of a video that will be ranked.
        depth: About how many of a candidate's best classes are kept; None takes twice ``k``. With
            1.5 times ``k``, one video in forty needed its candidates' own rows, again for every
            mixture, and that took nine tenths of a search.
        storage: Where the tables lie; None keeps them in memory.
        read_values: About how many probabilities of a candidate to read together.
        block_videos: The fewest videos in a block, but for the last one.

    Raises:
        PredictionsError: A file is gone, or a value is not a probability.
        OutputError: The disk has no room for what the storage does not keep in memory.
    """
    depth = depth or 2 * k
    step = max(1, read_values // known.num_classes)
    if storage is not None:
        storage.reserve(BOUND_BYTES * len(known.candidates) * len(known.ids))
    builders = [_Builder(known, np.flatnonzero(is_in), block_videos, storage) for is_in in parts]
    starts = range(0, len(known.ids), step)

    with progress("read candidates", len(known.ids)) as shown:
        for start, piece in zip(starts, _pieces(known, starts, k, depth), strict=True):
            stop = start + len(piece.counts)
            for is_in, builder in zip(parts, builders, strict=True):
                builder.add(piece.taken(is_in[start:stop]))
            shown.update(stop, "videos")
    return [builder.table() for builder in builders]


def _pieces(known: Candidates, starts: range, k: int, depth: int) -> "Iterator[_Piece]":
    """Yield what is kept of the videos from each start on, read by threads a few pieces ahead."""

    def read(start: int) -> _Piece:
        return _read(known, start, min(start + starts.step, len(known.ids)), k, depth)

    threads = ThreadPoolExecutor(NUM_THREADS)
    waiting: deque[Future[_Piece]] = deque()
    try:
        for start in starts:
            waiting.append(threads.submit(read, start))
            if len(waiting) > 2 * NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


@dataclass(frozen=True, eq=False)
class _Piece:
    """The part of a table that a few videos make; ``counts`` are their numbers of pairs."""

    counts: NDArray[np.int64]
    classes: NDArray[np.int32]
    is_hit: NDArray[np.bool_]
    values: Floats
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
    raw = [candidate.taken(np.arange(start, stop)) for candidate in known.candidates]
    rows = [
        np.maximum(block, 0) if candidate.predictions.is_sparse else block
        for candidate, block in zip(known.candidates, raw, strict=True)
    ]
    is_hit = known.labels.rows(start, stop).dense(known.num_classes)
    keeps, bounds, is_flat = _kept(known, raw, rows, is_hit, depth)
    is_sparse = any(candidate.predictions.is_sparse for candidate in known.candidates)
    doubtful = _doubtful(rows, keeps, bounds, k) if is_sparse else np.empty(0, np.int64)
    if doubtful.size:
        keeps[doubtful], bounds[:, doubtful], is_flat[:, doubtful] = _kept(
            known,
            [block[doubtful] for block in raw],
            [block[doubtful] for block in rows],
            is_hit[doubtful],
            DEEPER * depth,
        )
    some_flat = np.flatnonzero(is_flat.any(axis=0))
    if some_flat.size:  # of equal scores the lowest classes rank first, so the k lowest are enough
        left_out = ~keeps[some_flat]
        keeps[some_flat] |= left_out & (np.cumsum(left_out, axis=1) <= k)
    counts = np.count_nonzero(keeps, axis=1)
    pairs = np.flatnonzero(keeps)
    values = np.stack([block.reshape(-1)[pairs] for block in rows])
    return _Piece(
        counts,
        (pairs % known.num_classes).astype(np.int32),
        is_hit.reshape(-1)[pairs],
        values,
        np.stack([block.reshape(-1)[pairs] > -np.inf for block in raw]) if is_sparse else None,
        bounds,
        is_flat,
    )


def _kept(
    known: Candidates,
    raw: Sequence[Floats],
    rows: Sequence[Floats],
    is_hit: NDArray[np.bool_],
    depth: int,
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    """Return which pairs of some videos to keep, each candidate's bounds, and where it is flat.

    Args:
        known: The candidates.
        raw: For each candidate ``(n, C)``, ``-inf`` where it does not list a class.
        rows: The same with 0 there.
        is_hit: ``(n, C)``, the labels, which are kept.
        depth: About how many of a candidate's best classes are kept.
    """
    keeps = is_hit.copy()
    bounds = np.empty((len(rows), len(is_hit)))
    is_flat = np.empty(bounds.shape, np.bool_)
    for index, block in enumerate(rows):
        is_sparse = known.candidates[index].predictions.is_sparse
        bound, is_flat[index] = _bounds(block, depth)  # compared below in the rows' own type
        if is_sparse:
            lists_few = np.count_nonzero(raw[index] > -np.inf, axis=1) <= FEW * depth
            bound[lists_few] = 0
            is_flat[index, lists_few] = True
        bounds[index] = bound
        keeps |= block > bound[:, None]
        if is_sparse:  # listed as 0 is not the same as missing
            at_zero = np.flatnonzero(bound == 0)
            keeps[at_zero] |= raw[index][at_zero] == 0
    return keeps, bounds, is_flat


def _doubtful(
    rows: Sequence[Floats], keeps: NDArray[np.bool_], bounds: NDArray[np.float64], k: int
) -> NDArray[np.int64]:
    """Return the videos whose k best classes of the candidates' mean are not proved clearly."""
    counts = np.count_nonzero(keeps, axis=1)
    pairs = np.flatnonzero(keeps)
    sums = reduce(np.add, (block.reshape(-1).take(pairs) for block in rows))
    ends = np.cumsum(counts)
    columns = np.arange(counts.max(initial=k))
    padded = np.append(sums, 0)[
        np.where(columns < counts[:, None], (ends - counts)[:, None] + columns, len(sums))
    ]
    padded.partition(padded.shape[1] - k, axis=1)
    return np.flatnonzero(padded[:, -k] < MARGIN * bounds.sum(axis=0))


def _bounds(rows: Floats, depth: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Return a bound that about ``depth`` values of each row exceed, and where the rest equal it.

    The classes are dealt into groups, and the bound is the ``depth``-th best group maximum, which
    at most a few more than ``depth`` values are above. The ``depth``-th best value itself would cut
    sharper, but a partition of whole rows takes several times as long.
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

    def __init__(
        self,
        known: Candidates,
        videos: NDArray[np.int64],
        block_videos: int,
        storage: Storage | None,
    ) -> None:
        self.known = known
        self.videos = videos
        self.storage = storage
        self.num_joined = 0
        self.block_videos = block_videos
        self.blocks: list[Block] = []
        self.bounds: list[NDArray[np.float64]] = []
        self.is_flat: list[NDArray[np.bool_]] = []
        self.waiting: list[_Piece] = []

    def add(self, piece: _Piece) -> None:
        if not piece.counts.size:  # none of its videos is in this part
            return
        self.waiting.append(piece)
        if sum(len(waiting.counts) for waiting in self.waiting) >= self.block_videos:
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
            self.known.has_gaps,
            np.array([not candidate.predictions.is_sparse for candidate in candidates]),
            np.diff(self.known.labels.offsets)[self.videos],
            self.known.num_classes,
        )

    def _join(self) -> None:
        pieces, self.waiting = self.waiting, []
        is_listed = [piece.is_listed for piece in pieces if piece.is_listed is not None]
        self.bounds += [piece.bounds for piece in pieces]
        self.is_flat += [piece.is_flat for piece in pieces]
        start = self.num_joined
        offsets = np.cumsum(np.concatenate([[0], *(piece.counts for piece in pieces)]))
        self.num_joined += len(offsets) - 1
        matrices = [
            _joined([piece.classes[None] for piece in pieces]),
            _joined([piece.is_hit[None] for piece in pieces]),
            _joined([piece.values for piece in pieces]),
            _joined(is_listed) if is_listed else None,
        ]
        rows = self._placed([each for each in matrices if each is not None], len(offsets) - 1)
        classes, is_hit, values = rows[:3]
        self.blocks.append(
            Block(start, offsets, classes, is_hit, values, rows[3] if is_listed else None)
        )

    def _placed(self, matrices: Sequence[NDArray[Any]], num_videos: int) -> Sequence[Rows]:
        """Return a block's matrices where the storage has them."""
        storage = self.storage
        if storage is None:
            return matrices
        num_bytes = sum(each.nbytes for each in matrices)
        if storage.takes(num_bytes + SCORER_BYTES * matrices[0].size):
            return matrices
        if not storage.num_stored:  # as many bytes a video are expected of all that are left
            left = 1 - (self.num_joined - num_videos) / len(self.videos)
            storage.require(round(num_bytes / num_videos * left * len(self.known.ids)))
        return [storage.store(each) for each in matrices]


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays over pairs joined end to end, with one more place of zeros."""
    end = np.zeros((*parts[0].shape[:-1], 1), parts[0].dtype)
    return np.concatenate([*parts, end], axis=-1)
