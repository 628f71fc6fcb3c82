"""The order in which training reads records: a function of the files and the seed alone.

Each epoch shuffles the files, and then their records within a buffer. The buffer is only thought
of: it holds the places of records, so that the order is known before any frame is read, batch i
without the batches before it, and by every process alike.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.balance import UNIT, repeated
from ensemble_kit.data.remote import ahead
from ensemble_kit.data.tfrecord import BadRecord, Shard, locate_records

SHUFFLE_BYTES = 512 << 20  # about 1,500 videos of 300 frames of 1,152 bytes, or all of AudioSet
FILES_AHEAD = 8  # looked through by threads before their turn
PLACE_BYTES = 1 << 10  # counted beside a record's own bytes, so that tiny ones stay few as well

Shares: TypeAlias = Sequence[Sequence[int]]  # of each file's records: turns in an epoch


class Place(NamedTuple):
    """Where a record lies.

    Attributes:
        shard: Which of the files, counted from 0.
        number: Which record of the file, counted from 1.
        start: The byte of the file at which its payload starts.
        length: The bytes of its payload.
    """

    shard: int
    number: int
    start: int
    length: int


class Turn(NamedTuple):
    """A record's turn in training.

    Attributes:
        epoch: Counted from 0.
        position: In the order of the epoch, counted from 0.
        place: Where the record lies.
    """

    epoch: int
    position: int
    place: Place


class BatchPlan(NamedTuple):
    """What one process reads of one batch.

    Attributes:
        turns: The records, in the order of the batch.
        epoch: The epoch that the whole batch ends in.
    """

    turns: Sequence[Turn]
    epoch: int

    def __reduce__(self) -> "tuple[Any, ...]":
        """Go to a reading process as plain tuples, in a third of the time that named ones take."""
        return _plan_of, ([(epoch, at, *place) for epoch, at, place in self.turns], self.epoch)


def _plan_of(turns: Sequence[tuple[int, ...]], epoch: int) -> BatchPlan:
    made = [Turn(turn_epoch, at, Place(*place)) for turn_epoch, at, *place in turns]
    return BatchPlan(made, epoch)


class RecordIndex:
    """The places of the records of some files; each file is looked through once.

    Args:
        paths: The files.
        check_crc: Whether the lengths of records are compared with their checksums.
        on_bad: Called once for a file whose framing is broken, with the record where it breaks.
    """

    def __init__(
        self, paths: Sequence[Path], *, check_crc: bool, on_bad: Callable[[BadRecord], None]
    ) -> None:
        self._paths = paths
        self._check_crc = check_crc
        self._on_bad = on_bad
        self._found: dict[int, Shard] = {}
        self._kept: Mapping[int, NDArray[np.bool_]] | None = None

    @property
    def num_shards(self) -> int:
        """How many files there are."""
        return len(self._paths)

    @property
    def is_complete(self) -> bool:
        """Whether every file has been looked through."""
        return len(self._found) == self.num_shards

    @property
    def keeps_all(self) -> bool:
        """Whether no record has been left out."""
        return self._kept is None

    def keep(self, kept: Mapping[int, NDArray[np.bool_]]) -> None:
        """Leave out records from now on: for each file, which of its records are kept."""
        self._kept = kept

    def places(self, shards: Sequence[int], *, are_read: bool = False) -> Iterator[Place]:
        """Yield the place of every record of some files that is kept, file after file.

        Args:
            shards: The files.
            are_read: Whether the records will be read, so that files which the cache has dropped
                since they were looked through are fetched ahead.

        Raises:
            RecordError: A file is missing or empty.
        """
        looked_through = self._looked_through(shards)
        if are_read and self.is_complete:
            paths = ahead([self._paths[shard] for shard in shards])
            looked_through = (found for found, _ in zip(looked_through, paths, strict=True))
        for shard, found in looked_through:
            places = zip(found.starts.tolist(), found.lengths.tolist(), strict=True)
            for number, place in enumerate(places, 1):
                if self._kept is None or self._kept[shard][number - 1]:
                    yield Place(shard, number, *place)

    def shards(self, which: Sequence[int]) -> list[Shard]:
        """Return what the headers of some files say, in the order asked for."""
        return [found for _, found in self._looked_through(which)]

    def count(self) -> int:
        """Return the number of records of all files that are kept."""
        if self._kept is not None:
            return sum(int(np.count_nonzero(is_kept)) for is_kept in self._kept.values())
        return sum(len(shard.starts) for shard in self.shards(range(self.num_shards)))

    def _looked_through(self, shards: Sequence[int]) -> Iterator[tuple[int, Shard]]:
        """Yield each file and what is in it, some files being looked through ahead.

        A header takes a round trip to the disk, which over a network is half a millisecond, and
        training would wait for a thousand of them at every file.
        """
        if self.is_complete:
            yield from ((shard, self._found[shard]) for shard in shards)
            return
        pool = ThreadPoolExecutor(FILES_AHEAD)
        try:
            coming = deque(pool.submit(self._look_through, shard) for shard in shards[:FILES_AHEAD])
            for shard, after in zip_longest(shards, shards[FILES_AHEAD:]):
                found = coming.popleft().result()
                if after is not None:
                    coming.append(pool.submit(self._look_through, after))
                yield shard, found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _look_through(self, shard: int) -> Shard:
        if shard not in self._found:
            self._found[shard] = locate_records(
                self._paths[shard], check_crc=self._check_crc, on_bad=self._on_bad
            )
        return self._found[shard]


def batch_plans(
    index: RecordIndex,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    epochs: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    shares: Shares | None = None,
    shuffle_bytes: int = SHUFFLE_BYTES,
) -> Iterator[BatchPlan]:
    """Yield what to read for each batch, from batch ``start`` on.

    Batch i is the turns from ``i * batch_size`` on, so batches run on from one epoch into the next
    and all are full, but for the last one where ``epochs`` ends them. Each rank has its share of
    every batch, as ``numpy.array_split`` splits it: joined, the shares are the batch.
    """
    turns = training_order(
        index,
        seed=seed,
        start=start * batch_size,
        epochs=epochs,
        shares=shares,
        shuffle_bytes=shuffle_bytes,
    )
    while batch := list(islice(turns, batch_size)):
        share, larger = divmod(len(batch), num_ranks)
        first = rank * share + min(rank, larger)
        yield BatchPlan(batch[first : first + share + (rank < larger)], batch[-1].epoch)


def training_order(
    index: RecordIndex,
    *,
    seed: int,
    start: int = 0,
    epochs: int | None = None,
    shares: Shares | None = None,
    shuffle_bytes: int = SHUFFLE_BYTES,
) -> Iterator[Turn]:
    """Yield the records in the order of training, epoch after epoch, from turn ``start`` on.

    It ends after ``epochs`` of them, or at an epoch without a record. ``shuffled`` says what
    ``shuffle_bytes`` does.

    Args:
        index: The records.
        seed: Of the order.
        start: The first turn.
        epochs: How many epochs; None never ends.
        shares: How many turns each record has in an epoch, see ``balance``; None is one each.
        shuffle_bytes: See ``shuffled``.
    """
    first, skipped = divmod(start, max(1, index.count())) if start else (0, 0)
    for epoch in count(first) if epochs is None else range(first, epochs):
        random = np.random.default_rng((seed, epoch))
        shards = random.permutation(index.num_shards).tolist()
        found = index.places(shards, are_read=not skipped)  # what a resumed run skips is not
        if shares is not None:
            found = repeated(
                ((place, shares[place.shard][place.number - 1]) for place in found),
                start=int(random.integers(UNIT)),
            )
        places = shuffled(found, random, max_bytes=shuffle_bytes)
        position = -1
        for position, place in enumerate(places):
            if position >= skipped:
                yield Turn(epoch, position, place)
        if position < 0:
            return
        skipped = 0


def shuffled(
    places: Iterable[Place], random: np.random.Generator, *, max_bytes: int
) -> Iterator[Place]:
    """Yield all places in a random order: each is drawn from the ``max_bytes`` next ones.

    The bound keeps reading near one part of the disk, and a first batch from waiting until every
    file has been looked through.
    """
    buffer: list[Place] = []
    size = 0
    for place in places:
        buffer.append(place)
        size += place.length + PLACE_BYTES
        while size > max_bytes:
            drawn = int(random.random() * len(buffer))
            buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
            last = buffer.pop()
            size -= last.length + PLACE_BYTES
            yield last
    for drawn in random.permutation(len(buffer)).tolist():
        yield buffer[drawn]
