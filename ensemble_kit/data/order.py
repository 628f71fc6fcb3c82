"""The order in which training reads records: a function of the files and the seed alone.

Each epoch shuffles the files, and then their records within a buffer. The buffer is only thought
of: it holds the places of records, so that the order is known before any frame is read, batch i
without the batches before it, and by every process alike. Imports ``tfrecord``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.tfrecord import BadRecord, locate_records

SHUFFLE_BYTES = 512 << 20  # about 1,500 videos of 300 frames of 1,152 bytes, or all of AudioSet
PLACE_BYTES = 1 << 10  # counted beside a record's own bytes, so that tiny ones stay few as well


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
        self._found: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def num_shards(self) -> int:
        """How many files there are."""
        return len(self._paths)

    @property
    def is_complete(self) -> bool:
        """Whether every file has been looked through."""
        return len(self._found) == self.num_shards

    def places(self, shard: int) -> Iterator[Place]:
        """Yield the place of every record of a file, in order.

        Raises:
            RecordError: The file is missing or empty.
        """
        starts, lengths = self._look_through(shard)
        for number, place in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True), 1):
            yield Place(shard, number, *place)

    def count(self) -> int:
        """Return the number of records of all files."""
        return sum(len(self._look_through(shard)[0]) for shard in range(self.num_shards))

    def _look_through(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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
) -> Iterator[BatchPlan]:
    """Yield what to read for each batch, from batch ``start`` on.

    Batch i is the turns from ``i * batch_size`` on, so batches run on from one epoch into the next
    and all are full, but for the last one where ``epochs`` ends them. Each rank has its share of
    every batch, as ``numpy.array_split`` splits it: joined, the shares are the batch.
    """
    turns = training_order(index, seed=seed, start=start * batch_size, epochs=epochs)
    while batch := list(islice(turns, batch_size)):
        share, larger = divmod(len(batch), num_ranks)
        first = rank * share + min(rank, larger)
        yield BatchPlan(batch[first : first + share + (rank < larger)], batch[-1].epoch)


def training_order(
    index: RecordIndex, *, seed: int, start: int = 0, epochs: int | None = None
) -> Iterator[Turn]:
    """Yield the records in the order of training, epoch after epoch, from turn ``start`` on.

    It ends after ``epochs`` of them, or at an epoch without a record.
    """
    first, skipped = divmod(start, max(1, index.count())) if start else (0, 0)
    for epoch in count(first) if epochs is None else range(first, epochs):
        random = np.random.default_rng((seed, epoch))
        shards = random.permutation(index.num_shards).tolist()
        places = (place for shard in shards for place in index.places(shard))
        position = -1
        for position, place in enumerate(shuffled(places, random, max_bytes=SHUFFLE_BYTES)):
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
