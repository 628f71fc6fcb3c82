"""Files of records to batches of videos."""

import copy
import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain, count, islice
from os.path import isfile
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import CACHE_BYTES, AnyPath
from ensemble_kit.data.balance import by_shard, turns_of
from ensemble_kit.data.batch import Batch, Memory, collate
from ensemble_kit.data.decode import Decoder, Video
from ensemble_kit.data.folds import Fold, Part
from ensemble_kit.data.frame_choice import FrameChoice
from ensemble_kit.data.kinds import find_schema
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.order import BatchPlan, RecordIndex, Shares, batch_plans
from ensemble_kit.data.reading import Source, read
from ensemble_kit.data.reading_processes import read_in_processes
from ensemble_kit.data.remote import (
    ahead,
    default_cache,
    expanded_place,
    find_shards,
    folder_of,
    is_url,
    origin_of,
)
from ensemble_kit.data.schema import Schema, read_schema
from ensemble_kit.data.tfrecord import (
    BadRecord,
    is_gzipped_records,
    locate_records,
    numbered_records,
)
from ensemble_kit.errors import RecordError
from ensemble_kit.files import each_path
from ensemble_kit.wording import counted

__all__ = ["Batch", "Records"]

T = TypeVar("T")

LOGGER = logging.getLogger(__name__)


class Fingerprint(NamedTuple):
    """What identifies the content of a file of records.

    Attributes:
        content: Its size and a hash of the lengths and checksums of its records, or the version
            that its server gave it.
        modified_ns: When it was last modified, in nanoseconds since 1970; 0 for a shard at a URL.
    """

    content: str
    modified_ns: int


class Records:
    """The records of some files, and their schema.

    Without a schema, ``schema.toml`` beside the first file is taken, else the one in the folder
    above, else the schema follows from the first record's keys (see ``find_schema``).

    Args:
        patterns: Files, globs (``**`` for any depth of folders), or folders, for all
            ``*.tfrecord`` and ``*.tfrecord.gz`` in them; or URLs of these (``gs://``, ``s3://``,
            ``https://``). Files of a glob or folder come sorted; a file that is named twice is read
            once. Gzipped files are expanded into the cache when they are read.
        schema: The schema, or the path of its TOML.
        label_names: A CSV file of classes, whose names the schema then carries.
        check_crc: Whether all checksums are compared.
        skip_bad_records: Whether a bad record is skipped and counted, where it would be an error.
            One whose framing is broken takes the rest of its file with it, and counts as one.
        needs_labels: Whether every record must have its labels key; the challenge's test records
            have none, and models can tag them all the same.
        cache: The folder that files at URLs are fetched to and gzipped ones are expanded to; None
            takes ``default_cache``.
        cache_bytes: Maximum size of the files in it, in bytes; those used longest ago are removed.

    Attributes:
        patterns: The patterns, absolute.
        paths: The files, absolute; those at URLs and gzipped ones by their places in the cache,
            which are fetched or expanded when they are read.
        schema: What the records hold.
        part: Which of them, where ``folds`` has parted them; None for all.

    Raises:
        RecordError: A pattern matches nothing, or the schema cannot be read or found.
    """

    def __init__(
        self,
        patterns: AnyPath | Sequence[AnyPath],
        *,
        schema: Schema | AnyPath | None = None,
        label_names: AnyPath | None = None,
        check_crc: bool = True,
        skip_bad_records: bool = False,
        needs_labels: bool = True,
        cache: AnyPath | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        named = each_path(patterns)
        self.patterns = tuple(
            pattern if is_url(pattern) else os.path.abspath(pattern) for pattern in named
        )
        at = Path(cache or default_cache()).absolute()
        found = (
            find_shards(pattern, cache=at, cache_bytes=cache_bytes)
            if is_url(pattern)
            else _places(_expand(pattern), cache=at, cache_bytes=cache_bytes)
            for pattern in self.patterns
        )
        self.paths = tuple(dict.fromkeys(chain.from_iterable(found)))
        LOGGER.info("%s: %s of records", " ".join(self.patterns), counted(len(self.paths), "file"))
        self._check_crc = check_crc
        self._skip_bad_records = skip_bad_records
        self._needs_labels = needs_labels
        self._skipped: dict[tuple[Path, int], BadRecord] = {}
        self.part: Part | None = None
        self._index = RecordIndex(self.paths, check_crc=check_crc, on_bad=self._refuse)
        if isinstance(schema, str | os.PathLike):
            schema = read_schema(Path(schema))
        self.schema = schema or self._resolve_schema()
        if label_names is not None:
            self.schema = self.schema.with_label_names(Path(label_names))

    @property
    def skipped(self) -> tuple[BadRecord, ...]:
        """The bad records skipped so far, each once, however often the files were read."""
        return tuple(self._skipped.values())

    @property
    def num_skipped(self) -> int:
        """How many bad records were skipped so far."""
        return len(self._skipped)

    @property
    def skips_bad_records(self) -> bool:
        """Whether a bad record is skipped and counted."""
        return self._skip_bad_records

    def alone(self, path: Path) -> "Records":
        """Return the records of one of the files, read as all of them are.

        Bad records that are skipped in it are counted here as well.
        """
        records = self._copied((path,))
        records.patterns = (str(path),)
        return records

    def folds(self, fold: Fold) -> tuple["Records", "Records"]:
        """Return the records outside of a fold, and those in it, by a hash of their ids.

        Bad records that are skipped in either are counted here as well.
        """
        others, own = self._copied(self.paths), self._copied(self.paths)
        others.part, own.part = Part(fold, is_in=False), Part(fold, is_in=True)
        return others, own

    def _copied(self, paths: tuple[Path, ...]) -> "Records":
        """Return the records of some of the files, which share what is skipped."""
        records = copy.copy(self)
        records.paths = paths
        records._index = RecordIndex(paths, check_crc=self._check_crc, on_bad=records._refuse)
        return records

    def count(self) -> int:
        """Return the number of records, from their framing alone unless they are a part."""
        if self.part is not None:
            return sum(1 for _ in self.videos())
        return sum(
            len(locate_records(path, check_crc=False, on_bad=self._refuse).starts)
            for path in ahead(self.paths)
        )

    def fingerprints(self) -> list[Fingerprint]:
        """Return what identifies the content of each file, in the order of the files.

        A shard at a URL is known by the version that its server gave it, and is not fetched.

        Raises:
            RecordError: A file is missing or empty.
            BadRecord: The framing of a file is broken.
        """
        origins = [origin_of(path) for path in self.paths]
        here = [number for number, origin in enumerate(origins) if origin is None]
        shards = dict(zip(here, self._index.shards(here), strict=True))
        return [
            Fingerprint(
                f"{shards[number].size}:{shards[number].sha256}", shards[number].modified_ns
            )
            if origin is None
            else Fingerprint(f"{origin.num_bytes}:{origin.version}", 0)
            for number, origin in enumerate(origins)
        ]

    def is_whole(self, path: Path) -> bool:
        """Return whether every payload of a file agrees with its checksum, where that counts.

        It does not count where checksums are not compared, or bad records are skipped.
        """
        if not self._check_crc or self._skip_bad_records:
            return True
        bad: list[BadRecord] = []
        for _ in numbered_records(path, on_bad=bad.append):
            pass
        return not bad

    def decoded(self, decode: Callable[[memoryview, Path, int], T]) -> Iterator[T]:
        """Yield what a function makes of each record, whatever part these records are.

        Args:
            decode: Given a record, its file, and its number in it, from 1; it may raise
                ``BadRecord``, which is skipped where bad records are.

        Raises:
            RecordError: As ``videos``.
        """
        for path in ahead(self.paths):
            for number, record in numbered_records(
                path, check_crc=self._check_crc, on_bad=self._refuse
            ):
                try:
                    yield decode(record, path, number)
                except BadRecord as error:
                    self._refuse(error)

    def videos(self) -> Iterator[Video]:
        """Yield every video, in the order of the files.

        Raises:
            RecordError: A file is missing or empty.
            BadRecord: A record is damaged or is not what the schema says.
        """
        return self._videos(lambda _: True)

    def placed_videos(self) -> Iterator[tuple[Path, int, Video]]:
        """Yield every video as ``videos`` does, after its file and its number in it, from 1."""
        return self._placed(lambda _: True)

    def _videos(self, is_wanted: Callable[[int], bool]) -> Iterator[Video]:
        for _, _, video in self._placed(is_wanted):
            yield video

    def _placed(self, is_wanted: Callable[[int], bool]) -> Iterator[tuple[Path, int, Video]]:
        """Yield the videos of the records that are wanted, by their index among all of the part."""
        decoder = Decoder(self.schema, needs_labels=self._needs_labels)
        indices = count()

        def decode(record: memoryview, path: Path, number: int) -> tuple[Path, int, Video] | None:
            if self.part is None and not is_wanted(next(indices)):
                return None
            video = decoder.decode(record, path=path, number=number)
            is_out = self.part is not None and not (
                self.part.has(video.id) and is_wanted(next(indices))
            )
            return None if is_out else (path, number, video)

        for placed in self.decoded(decode):
            if placed is not None:
                yield placed

    def batches(self, batch_size: int, *, rank: int = 0, num_ranks: int = 1) -> Iterator[Batch]:
        """Yield every video once, in the order of the files; the last batch may be short.

        Args:
            batch_size: Videos of a batch.
            rank: Which of ``num_ranks`` this process is; it is given every ``num_ranks``-th batch,
                from batch ``rank`` on, which may be none.
            num_ranks: Processes that share the records.

        Raises:
            RecordError: As ``videos``, or no record is good.
        """
        videos = self._videos(lambda index: index // batch_size % num_ranks == rank)
        memory = Memory()
        is_first = True
        while chunk := list(islice(videos, batch_size)):
            yield collate(chunk, self.schema, memory)
            is_first = False
        if is_first and rank == 0:
            raise self._no_record()

    def training_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        choice: FrameChoice | None = None,
        workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        epochs: int | None = None,
        balance: float | None = None,
    ) -> Iterator[Batch]:
        """Return batches in the order of training, from batch ``start`` on.

        The order is that of ``training_order``: the same for the same files and seed, whatever the
        number of workers and ranks. Batches run on from one epoch into the next, so that all are
        full, and every record comes once an epoch unless ``balance`` says otherwise. Where bad
        records are skipped, a batch is shorter by those it had, and may be empty.

        Args:
            batch_size: How many videos all ranks together take at a time.
            seed: Of the order and of the frames chosen.
            start: The first batch, as where a run is taken up again; nothing before it is read.
            choice: Which frames of a video to copy; None copies all.
            workers: Processes that read ahead; 0 reads in this one.
            rank: Which of ``num_ranks`` this process is; its share of each batch is what
                ``numpy.array_split`` gives it.
            num_ranks: Processes that train together.
            epochs: Stop after this many, with a batch that may be short; None never stops.
            balance: The power in [0, 1] of a record's rarity by which it comes more often, see
                ``balance``; all records are read once for their labels. None is 0.

        Raises:
            RecordError: As ``videos``, or no record is good, the ranks outnumber the videos of a
                batch, a file disappears or changes, or a reading process is killed.
        """
        if batch_size < num_ranks:
            raise RecordError(
                f"A batch of {counted(batch_size, 'video')} cannot be shared by {num_ranks} "
                "processes.",
                hint=f"Set training.batch_size to {num_ranks} or more, or start fewer processes.",
            )
        if self.part is not None and self._index.keeps_all:
            self._index.keep(self._kept())
        source = Source(
            paths=self.paths,
            schema=self.schema,
            check_crc=self._check_crc,
            needs_labels=self._needs_labels,
            skips_bad=self._skip_bad_records,
            seed=seed,
            choice=choice,
        )
        plans = batch_plans(
            self._index,
            batch_size,
            seed=seed,
            start=start,
            epochs=epochs,
            rank=rank,
            num_ranks=num_ranks,
            shares=self._shares(balance) if balance else None,
        )
        return self._read(plans, source, workers)

    def _kept(self) -> dict[int, NDArray[np.bool_]]:
        """Return which records of each file are in the part; bad ones are in none."""
        shards = {path: shard for shard, path in enumerate(self.paths)}
        counts = [len(shard.starts) for shard in self._index.shards(range(len(self.paths)))]
        kept = {shard: np.zeros(count, np.bool_) for shard, count in enumerate(counts)}
        for path, number, _ in self.placed_videos():
            kept[shards[path]][number - 1] = True
        if not any(is_kept.any() for is_kept in kept.values()):
            raise self._no_record()
        return kept

    def _shares(self, balance: float) -> Shares:
        """Return the turns of each file's records in an epoch; bad ones count as unlabelled."""
        counts = [len(shard.starts) for shard in self._index.shards(range(len(self.paths)))]
        if not any(counts):
            raise self._no_record()
        starts = np.cumsum([0, *counts])
        places = self._index.places(range(len(self.paths)))
        kept = [starts[place.shard] + place.number - 1 for place in places]
        firsts = dict(zip(self.paths, starts.tolist(), strict=False))
        classes = {
            firsts[path] + number - 1: video.classes for path, number, video in self.placed_videos()
        }
        labels = LabelLists.from_lists(classes.get(row, ()) for row in kept)
        turns = np.zeros(sum(counts), np.int64)
        turns[kept] = turns_of(labels, self.schema.num_classes, balance)
        return by_shard(turns, counts)

    def _read(self, plans: Iterator[BatchPlan], source: Source, workers: int) -> Iterator[Batch]:
        reading = read_in_processes(source, plans, workers) if workers else read(source, plans)
        with closing(reading):
            for batch, skipped in reading:
                for error in skipped:
                    self._refuse(error)
                if not batch.ids and self._is_none_good():
                    break
                yield batch
        if self._is_none_good():
            raise self._no_record()

    def _is_none_good(self) -> bool:
        """Return whether every record has been found to be bad."""
        return self._index.is_complete and all(
            (self.paths[place.shard], place.number) in self._skipped
            for place in self._index.places(range(self._index.num_shards))
        )

    def _refuse(self, error: BadRecord) -> None:
        if not self._skip_bad_records:
            raise error
        self._skipped.setdefault((error.path, error.number), error)

    def _resolve_schema(self) -> Schema:
        beside = folder_of(self.paths[0])
        for folder in (beside, beside.parent):
            if isfile(folder / "schema.toml"):
                return read_schema(folder / "schema.toml")
        for path in self.paths:
            for number, record in numbered_records(
                path, check_crc=self._check_crc, on_bad=self._refuse
            ):
                return find_schema(record, path=path, number=number)
        raise self._no_record()

    def _no_record(self) -> RecordError:
        if self.part is not None:
            return RecordError(
                f"{self.paths[0]}: no record of the {counted(len(self.paths), 'file')} is in "
                f"{self.part}.",
                hint="Take fewer folds, or more records.",
            )
        return RecordError(
            f"{self.paths[0]}: no record of {counted(len(self.paths), 'file')} can be read.",
            hint="Copy the files again from where they are whole.",
        )


def _expand(pattern: str) -> list[Path]:
    """Return the files of one pattern, sorted; a name that exists is never taken as a glob."""
    if os.path.isdir(pattern):
        found = glob.glob(os.path.join(glob.escape(pattern), "*.tfrecord"))
        found += glob.glob(os.path.join(glob.escape(pattern), "*.tfrecord.gz"))
        what = "holds no *.tfrecord files"
    elif os.path.exists(pattern) or not glob.has_magic(pattern):
        found, what = [pattern] if os.path.exists(pattern) else [], "does not exist"
    else:
        found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        what = "matches no file"
    if not found:
        raise RecordError(f"{pattern} {what}.", hint="Name TFRecord files that exist.")
    return [Path(name) for name in sorted(found)]


def _places(paths: list[Path], *, cache: Path, cache_bytes: int) -> list[Path]:
    """Return files as they are read: a gzipped one by its place in the cache.

    A file is looked into where its name says that it is gzipped, or where the first one is, for the
    files of one pattern are alike and there may be many thousands.
    """
    looks = is_gzipped_records(paths[0])
    return [
        expanded_place(path, cache=cache, cache_bytes=cache_bytes)
        if (looks or path.suffix == ".gz") and is_gzipped_records(path)
        else path
        for path in paths
    ]
