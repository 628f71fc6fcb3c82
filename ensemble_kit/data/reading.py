"""The records of a batch's plan to the batch.

Records are read, not mapped: a file that is cut short under a mapping ends the whole process.
"""

import errno
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO, FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.alike import SMALL_BYTES, AlikeDecoder, Videos
from ensemble_kit.data.batch import Batch, BatchLayout, Collator, Contents, Memory
from ensemble_kit.data.decode import Decoder, frame_bytes
from ensemble_kit.data.frame_choice import Chosen, Draws, FrameChoice
from ensemble_kit.data.order import BatchPlan, Place, Turn
from ensemble_kit.data.remote import open_ready
from ensemble_kit.data.schema import Schema
from ensemble_kit.data.tfrecord import FOOTER, BadRecord, damaged, matches_crc
from ensemble_kit.errors import RecordError

LEAVE_FILES = "Put the file back as it was, and leave the records as they are while they are read."
SMALL_FILE = 64 << 10  # bytes; up to so many, a file is read whole and kept
WHOLE_BYTES = 64 << 20  # of all small files that are kept
OPEN_FILES = 128  # kept open; neighbours in the order of training are from few files


@dataclass(frozen=True)
class Source:
    """Where records are read from and how: all that a reading process needs to know.

    Attributes:
        paths: The files, in the order in which ``Place.shard`` counts them.
        schema: What the records hold.
        check_crc: Whether the checksum of each record is compared.
        needs_labels: Whether a record without labels is bad.
        skips_bad: Whether a bad record is left out of its batch, where it would be an error.
        seed: Of the draws of ``choice``.
        choice: Which frames to copy; None copies all.
    """

    paths: tuple[Path, ...]
    schema: Schema
    check_crc: bool
    needs_labels: bool
    skips_bad: bool
    seed: int
    choice: FrameChoice | None

    def layout(self, plan: BatchPlan) -> BatchLayout:
        """Return where a batch will lie, for as many frames as its records have room for."""
        num_frames = max((self.most_frames(turn.place) for turn in plan.turns), default=0)
        if self.choice is not None:
            wanted = self.choice.num_frames
            num_frames = wanted if self.choice.in_order else min(wanted, num_frames)
        return BatchLayout(
            self.schema,
            num_videos=len(plan.turns),
            num_frames=num_frames,
            is_weighted=self.choice is not None,
        )

    def most_frames(self, place: Place) -> int:
        """Return the most frames that a record of its length can have; most records have them."""
        return max(1, min(self.schema.max_frames, place.length // self._frame_bytes))

    @cached_property
    def _frame_bytes(self) -> int:
        return frame_bytes(self.schema)


def read(
    source: Source,
    plans: Iterable[BatchPlan],
    *,
    open_files: int = OPEN_FILES,
    whole_bytes: int = WHOLE_BYTES,
) -> Generator[tuple[Batch, list[BadRecord]], None, None]:
    """Yield the batch of each plan, and the records that were left out of it, read in this process.

    Args:
        source: The records.
        plans: Which records each batch has.
        open_files: How many files to keep open, if the system allows so many.
        whole_bytes: Maximum size of all small files that are read whole and kept.

    Raises:
        RecordError: A file has gone or changed.
        BadRecord: A record is bad and such ones are not skipped.
    """
    memory = Memory()
    with closing(BatchReader(source, open_files=open_files, whole_bytes=whole_bytes)) as reader:
        for plan in plans:
            layout = source.layout(plan)
            block = memory.lend(layout.num_bytes)
            contents, skipped = reader.read(plan, layout, block)
            batch = layout.batch(block, contents, epoch=plan.epoch)
            del block
            yield batch, skipped
            del batch


class BatchReader:
    """Reads the records of one batch after the other."""

    def __init__(
        self, source: Source, *, open_files: int = OPEN_FILES, whole_bytes: int = WHOLE_BYTES
    ) -> None:
        self._source = source
        self._decoder = Decoder(source.schema, needs_labels=source.needs_labels)
        self._alike_decoder = AlikeDecoder(source.schema, needs_labels=source.needs_labels)
        self._records = np.empty(0, np.uint8)  # of one batch, where they are small
        self._draws = Draws(source.seed)
        self._files = RecordFiles(
            source.paths,
            check_crc=source.check_crc,
            open_files=open_files,
            whole_bytes=whole_bytes,
        )

    def read(
        self, plan: BatchPlan, layout: BatchLayout, memory: NDArray[np.uint8]
    ) -> tuple[Contents, list[BadRecord]]:
        """Write a batch to a block of memory; return the rest of it, and the records left out.

        Raises:
            RecordError: A file has gone or changed.
            BadRecord: A record is bad and such ones are not skipped.
        """
        if self._are_small(plan) and (videos := self._alike(plan)) is not None:
            collator = Collator(layout, memory)
            collator.add_all(*videos)
            if collator.are_finite():
                return collator.finish(), []
        source = self._source
        most_frames = [source.most_frames(turn.place) for turn in plan.turns]
        expected = list(map(self._chosen, plan.turns, most_frames))
        longest = max((len(chosen.rows) for chosen in expected if chosen), default=None)
        collator = Collator(layout, memory, num_frames=longest)
        skipped = []
        for turn, most, chosen in zip(plan.turns, most_frames, expected, strict=True):
            place = turn.place
            try:
                video = self._decoder.decode(
                    self._files.read(place), path=source.paths[place.shard], number=place.number
                )
            except BadRecord as error:
                if not source.skips_bad:
                    raise
                skipped.append(error)
                continue
            is_guessed = chosen is None or video.num_frames == most
            collator.add(video, chosen if is_guessed else self._chosen(turn, video.num_frames))
        return collator.finish(), skipped

    def _are_small(self, plan: BatchPlan) -> bool:
        """Return whether the records of a batch are decoded together; see ``alike``."""
        is_tried = self._source.choice is None and self._alike_decoder.is_worth_it
        return is_tried and all(turn.place.length <= SMALL_BYTES for turn in plan.turns)

    def _alike(self, plan: BatchPlan) -> Videos | None:
        """Return the videos of a batch; None where one of its records is to be read by itself."""
        by_length: dict[int, list[int]] = {}
        for row, turn in enumerate(plan.turns):
            by_length.setdefault(turn.place.length, []).append(row)
        num_bytes = sum(turn.place.length + FOOTER.size for turn in plan.turns)
        if len(self._records) < num_bytes:
            self._records = np.empty(num_bytes, np.uint8)
        groups, start = [], 0
        try:
            for length, rows in by_length.items():
                size = length + FOOTER.size
                framed = self._records[start : start + size * len(rows)].reshape(len(rows), size)
                content = framed.reshape(-1).data
                for number, row in enumerate(rows):
                    self._files.read_to(
                        plan.turns[row].place, content[number * size : (number + 1) * size]
                    )
                groups.append((np.array(rows), framed[:, :length]))
                start += size * len(rows)
        except BadRecord:
            return None
        return self._alike_decoder.decode(groups)

    def _chosen(self, turn: Turn, num_available: int) -> Chosen | None:
        choice = self._source.choice
        if choice is None:
            return None
        return choice.take(
            self._draws.of(turn.epoch, turn.position, choice.num_draws), num_available
        )

    def close(self) -> None:
        """Close all files."""
        self._files.close()


def _most_open_files(wanted: int) -> int:
    """Return how many files may be kept open: at most a quarter of what a process is allowed."""
    try:
        from resource import RLIMIT_NOFILE, getrlimit
    except ImportError:  # Windows
        return wanted
    allowed, _ = getrlimit(RLIMIT_NOFILE)
    return wanted if allowed < 0 else max(1, min(wanted, allowed // 4))


class RecordFiles:
    """Reads records at known places, through a buffer that the next one overwrites.

    Args:
        paths: The files.
        check_crc: Whether the checksum of each record is compared.
        open_files: How many files to keep open, if the system allows so many.
        whole_bytes: Maximum size of all small files that are read whole and kept.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        check_crc: bool,
        open_files: int = OPEN_FILES,
        whole_bytes: int = WHOLE_BYTES,
    ) -> None:
        self._whole_bytes = whole_bytes
        self._paths = paths
        self._check_crc = check_crc
        self._files: dict[int, FileIO] = {}
        self._whole: dict[int, BytesIO] = {}
        self._num_bytes = 0  # of those
        self._most = _most_open_files(open_files)
        self._buffer = memoryview(bytearray())

    def read(self, place: Place) -> memoryview:
        """Return the payload of a record, until the next call.

        Raises:
            RecordError: The file cannot be read any more, or ends before the record does.
            BadRecord: The payload differs from its checksum.
        """
        size = place.length + FOOTER.size
        if len(self._buffer) < size:
            self._buffer = memoryview(bytearray(size))
        self.read_to(place, self._buffer[:size])
        return self._buffer[: place.length]

    def read_to(self, place: Place, framed: memoryview) -> None:
        """Read the payload of a record and its checksum to some memory.

        Raises:
            RecordError: The file cannot be read any more, or ends before the record does.
            BadRecord: The payload differs from its checksum.
        """
        size, path = len(framed), self._paths[place.shard]
        try:
            file = self._open(place.shard)
            file.seek(place.start)
            done = file.readinto(framed)
            while done < size and (count := file.readinto(framed[done:])):
                done += count
        except OSError as error:
            raise RecordError(
                f"{path} cannot be read any more: {error.strerror}.", hint=LEAVE_FILES
            ) from error
        if done < size:
            raise RecordError(
                f"{path} has become shorter: it ends within record {place.number}, which was whole "
                "when the reading began.",
                hint=LEAVE_FILES,
            )
        if self._check_crc and not matches_crc(framed):
            raise damaged(path, place.number, place.length)

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()
        self._whole.clear()

    def _open(self, shard: int) -> FileIO | BytesIO:
        """Return a file, or the content of a small one: AudioSet has one for every few videos."""
        whole = self._whole.get(shard)
        if whole is not None:
            return whole
        file = self._files.pop(shard, None)
        while file is None:
            try:
                file = open_ready(self._paths[shard], FileIO)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._files:
                    raise
                self._most = len(self._files)  # all that the system allows beside other files
                self._close_oldest()
            else:
                size = os.fstat(file.fileno()).st_size
                if size <= SMALL_FILE and self._num_bytes + size <= self._whole_bytes:
                    with file:
                        self._whole[shard] = BytesIO(file.read())
                    self._num_bytes += size
                    return self._whole[shard]
        self._files[shard] = file  # the last one used comes last
        if len(self._files) > self._most:
            self._close_oldest()
        return file

    def _close_oldest(self) -> None:
        self._files.pop(next(iter(self._files))).close()
