"""Files of records to batches of videos. Imports the rest of ``data`` and ``errors``."""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.decode import Decoder, Video
from ensemble_kit.data.kinds import find_schema
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import Schema, read_schema
from ensemble_kit.data.tfrecord import BadRecord, numbered_records
from ensemble_kit.errors import RecordError

SHUFFLE_BYTES = 512 << 20  # about 1,500 videos of 300 frames of 1,152 bytes, or all of AudioSet
VIDEO_BYTES = 1 << 10  # what Python's objects of one video take beside its frames


@dataclass(frozen=True)
class Batch:
    """Some videos of a schema, as arrays.

    Attributes:
        ids: B video ids.
        frames: ``(B, T, D)`` for each modality's name, in the schema's value type; T is the
            longest video's, zeros fill the rest.
        num_frames: ``(B,)``, int64.
        labels: The classes of each video.
    """

    ids: tuple[str, ...]
    frames: Mapping[str, NDArray[Any]]
    num_frames: NDArray[np.int64]
    labels: LabelLists


class Records:
    """The records of some files, and their schema.

    Without a schema, ``schema.toml`` beside the first file is taken, else the one in the folder
    above, else the schema is told from the first record's keys (see ``find_schema``).

    Args:
        patterns: Files, globs (``**`` for any depth of folders), or folders, for all
            ``*.tfrecord`` in them. Files of a glob or folder come sorted; a file that is named
            twice is read once.
        schema: The schema, or the path of its TOML.
        label_names: A CSV file of classes, whose names the schema then carries.
        check_crc: Whether all checksums are compared.
        skip_bad_records: Whether a bad record is skipped and counted, where it would be an error.
            One whose framing is broken takes the rest of its file with it, and counts as one.
        needs_labels: Whether every record must have its labels key; the challenge's test records
            have none, and models can tag them all the same.

    Attributes:
        patterns: The patterns, absolute.
        paths: The files, absolute.
        schema: What the records hold.

    Raises:
        RecordError: A pattern matches nothing, or the schema cannot be read or told.
    """

    def __init__(
        self,
        patterns: Sequence[str | Path],
        *,
        schema: Schema | Path | None = None,
        label_names: Path | None = None,
        check_crc: bool = True,
        skip_bad_records: bool = False,
        needs_labels: bool = True,
    ) -> None:
        self.patterns = tuple(os.path.abspath(pattern) for pattern in patterns)
        self.paths = tuple(dict.fromkeys(p for pattern in self.patterns for p in _expand(pattern)))
        self._check_crc = check_crc
        self._skip_bad_records = skip_bad_records
        self._needs_labels = needs_labels
        self._skipped: dict[tuple[Path, int], BadRecord] = {}
        if isinstance(schema, Path):
            schema = read_schema(schema)
        self.schema = schema or self._resolve_schema()
        if label_names is not None:
            self.schema = self.schema.with_label_names(label_names)

    @property
    def skipped(self) -> tuple[BadRecord, ...]:
        """The bad records skipped so far, each once, however often the files were read."""
        return tuple(self._skipped.values())

    @property
    def num_skipped(self) -> int:
        """How many bad records were skipped so far."""
        return len(self._skipped)

    def count(self) -> int:
        """Return the number of records, from their framing alone."""
        return sum(
            1
            for path in self.paths
            for _ in numbered_records(path, check_crc=False, on_bad=self._refuse)
        )

    def videos(self) -> Iterator[Video]:
        """Yield every video, in the order of the files.

        Raises:
            RecordError: A file is missing or empty.
            BadRecord: A record is damaged or is not what the schema says.
        """
        return self._videos(self.paths)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield every video once, in the order of the files; the last batch may be short.

        Raises:
            RecordError: As ``videos``, or no record is good.
        """
        videos = self.videos()
        is_first = True
        while chunk := list(islice(videos, batch_size)):
            yield collate(chunk, self.schema)
            is_first = False
        if is_first:
            raise self._no_record()

    def training_batches(self, batch_size: int, *, seed: int, epoch: int = 0) -> Iterator[Batch]:
        """Yield one epoch in a random order, the same for the same seed and epoch.

        Files are shuffled, then videos within a buffer of 512 MiB. The last batch is left out if
        it is short, unless it is the only one.

        Raises:
            RecordError: As ``videos``, or no record is good.
        """
        random = np.random.default_rng((seed, epoch))
        paths = [self.paths[index] for index in random.permutation(len(self.paths))]
        videos = shuffled(self._videos(paths), random)
        is_first = True
        while chunk := list(islice(videos, batch_size)):
            if len(chunk) == batch_size or is_first:
                yield collate(chunk, self.schema)
            is_first = False
        if is_first:
            raise self._no_record()

    def _videos(self, paths: Iterable[Path]) -> Iterator[Video]:
        decoder = Decoder(self.schema, needs_labels=self._needs_labels)
        for path in paths:
            for number, record in numbered_records(
                path, check_crc=self._check_crc, on_bad=self._refuse
            ):
                try:
                    video = decoder.decode(record, path=path, number=number)
                except BadRecord as error:
                    self._refuse(error)
                else:
                    yield video

    def _refuse(self, error: BadRecord) -> None:
        if not self._skip_bad_records:
            raise error
        self._skipped.setdefault((error.path, error.number), error)

    def _resolve_schema(self) -> Schema:
        for folder in (self.paths[0].parent, self.paths[0].parent.parent):
            if (folder / "schema.toml").is_file():
                return read_schema(folder / "schema.toml")
        for path in self.paths:
            for number, record in numbered_records(
                path, check_crc=self._check_crc, on_bad=self._refuse
            ):
                return find_schema(record, path=path, number=number)
        raise self._no_record()

    def _no_record(self) -> RecordError:
        return RecordError(
            f"{self.paths[0]}: no record of the {len(self.paths)} files can be read.",
            mend="Copy the files again from where they are whole.",
        )


def collate(videos: Sequence[Video], schema: Schema) -> Batch:
    """Return videos as one batch, padded with zeros to the longest."""
    num_frames = np.array([video.num_frames for video in videos], np.int64)
    frames = {}
    for modality in schema.modalities:
        shape = len(videos), int(num_frames.max()), modality.width
        frames[modality.name] = padded = np.zeros(shape, modality.value_type)
        for row, video in zip(padded, videos, strict=True):
            row[: video.num_frames] = video.frames[modality.name]
    labels = LabelLists.from_lists(video.classes for video in videos)
    return Batch(tuple(video.id for video in videos), frames, num_frames, labels)


def shuffled(
    videos: Iterator[Video], random: np.random.Generator, *, max_bytes: int = SHUFFLE_BYTES
) -> Iterator[Video]:
    """Yield all videos in a random order: each is drawn from the ``max_bytes`` next ones."""
    buffer: list[Video] = []
    size = 0
    for video in videos:
        buffer.append(video)
        size += _size(video)
        while size > max_bytes:
            index = int(random.integers(len(buffer)))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            drawn = buffer.pop()
            size -= _size(drawn)
            yield drawn
    for index in random.permutation(len(buffer)):
        yield buffer[index]


def _size(video: Video) -> int:
    return VIDEO_BYTES + sum(frames.nbytes for frames in video.frames.values())


def _expand(pattern: str) -> list[Path]:
    """Return the files of one pattern, sorted; a name that exists is never taken as a glob."""
    if os.path.isdir(pattern):
        found = glob.glob(os.path.join(glob.escape(pattern), "*.tfrecord"))
        what = "holds no *.tfrecord files"
    elif os.path.exists(pattern) or not glob.has_magic(pattern):
        found, what = [pattern] if os.path.exists(pattern) else [], "does not exist"
    else:
        found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        what = "matches no file"
    if not found:
        raise RecordError(f"{pattern} {what}.", mend="Name TFRecord files that exist.")
    return [Path(name) for name in sorted(found)]
