"""The segments of the YouTube-8M challenge of 2019: ratings of some seconds of a video.

A record of that challenge's validation partition says in its context which segments people have
looked at: ``segment_start_times`` in seconds, ``segment_labels``, the class that was asked about,
and ``segment_scores``, 1 where the segment shows it and 0 where it does not. The three lists go
together entry by entry. Most classes of a segment have no rating, which says nothing of them.

Source: google/youtube-8m, ``readers.py`` and ``segment_eval_inference.py``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ensemble_kit.choices import SEGMENT_SECONDS
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.decode import Decoder, Video
from ensemble_kit.data.fields import split
from ensemble_kit.data.protos import Feature
from ensemble_kit.data.tfrecord import BadRecord
from ensemble_kit.errors import RecordError

STARTS, LABELS, SCORES = b"segment_start_times", b"segment_labels", b"segment_scores"
HINT = "Name records of the validation partition of YouTube-8M 2019 (3/frame/validate)."


class Ratings(NamedTuple):
    """What people have said of some segments of a video, R ratings.

    Attributes:
        video: The video's id.
        starts: ``(R,)``, where each segment starts, in seconds.
        classes: ``(R,)``, the class that was asked about.
        is_shown: ``(R,)``, bool, whether the segment shows it.
    """

    video: str
    starts: NDArray[np.int64]
    classes: NDArray[np.int64]
    is_shown: NDArray[np.bool_]

    def named(self) -> Iterator[tuple[str, int, bool]]:
        """Yield the name of each segment as submissions write it, the class, and what was said."""
        for start, index, is_shown in zip(
            self.starts.tolist(), self.classes.tolist(), self.is_shown.tolist(), strict=True
        ):
            yield segment_name(self.video, start), index, is_shown


def segment_name(video: str, start: int) -> str:
    """Return the name of the segment of a video that starts at some second: ``VIDEO:START``."""
    return f"{video}:{start}"


def read_ratings(records: Records) -> Iterator[Ratings]:
    """Yield the ratings of each video that has some.

    Args:
        records: The records; their frames are not looked at.

    Raises:
        RecordError: A file is missing or empty, or no record has ratings.
        BadRecord: A record is damaged, or its three lists are not of one length.
    """
    id_key, has_some = records.schema.id_key.encode(), False

    def decode(record: memoryview, path: Path, number: int) -> Ratings | None:
        return _ratings(record, id_key, path, number)

    for ratings in records.decoded(decode):
        if ratings is not None:
            has_some = True
            yield ratings
    if not has_some:
        raise _no_ratings(records)


def rated_segments(records: Records) -> Iterator[Video]:
    """Yield each rated segment as a video of its frames, named as submissions name it.

    Its labels are the classes that it is known to show. They say nothing of the others.

    Args:
        records: The records, of frames.

    Raises:
        RecordError: As ``read_ratings``.
        BadRecord: As ``read_ratings``; or a segment lies after the last frame, or has a class
            outside of the vocabulary.
    """
    schema, decoder = records.schema, Decoder(records.schema, needs_labels=False)
    id_key, has_some = schema.id_key.encode(), False

    def decode(record: memoryview, path: Path, number: int) -> list[Video]:
        ratings = _ratings(record, id_key, path, number)
        if ratings is None:
            return []
        if ratings.classes.max(initial=0) >= schema.num_classes:
            problem = f"a segment has class {ratings.classes.max()}, outside of the classes."
            raise _bad(path, number, problem)
        video = decoder.decode(record, path=path, number=number)
        first = np.rint(ratings.starts * schema.frames_per_second).astype(np.int64)
        if first.max(initial=0) >= video.num_frames:
            problem = f"a segment starts at {ratings.starts.max()} s, after the last frame."
            raise _bad(path, number, problem)
        return list(_cut(video, ratings, schema.frames_per_second))

    for segments in records.decoded(decode):
        for segment in segments:
            has_some = True
            yield segment
    if not has_some:
        raise _no_ratings(records)


def _cut(video: Video, ratings: Ratings, frames_per_second: float) -> Iterator[Video]:
    """Yield the segments of a video that have ratings, by their starts."""
    for start in np.unique(ratings.starts).tolist():
        shown = ratings.classes[(ratings.starts == start) & ratings.is_shown]
        first = round(start * frames_per_second)
        last = round((start + SEGMENT_SECONDS) * frames_per_second)
        frames = {name: rows[first:last] for name, rows in video.frames.items()}
        yield Video(segment_name(video.id, start), np.unique(shown), frames)


def _ratings(record: memoryview, id_key: bytes, path: Path, number: int) -> Ratings | None:
    """Return the ratings of a record, or None where it has none."""
    try:
        context, _ = split(record)
        found = {
            key: Feature.FromString(b"".join(map(bytes, context[key])))
            for key in (id_key, STARTS, LABELS, SCORES)
            if key in context
        }
    except DecodeError:
        raise _bad(path, number, "it is neither an Example nor a SequenceExample.") from None
    if LABELS not in found:
        return None
    missing = {id_key, STARTS, SCORES} - found.keys()
    if missing:
        raise _bad(path, number, f"it has {LABELS.decode()!r} and no {min(missing).decode()!r}.")
    ids = found[id_key].bytes_list.value
    starts, classes = (found[key].int64_list.value for key in (STARTS, LABELS))
    scores = found[SCORES].float_list.value
    if len(ids) != 1 or not len(starts) == len(classes) == len(scores):
        counts = f"{len(starts)} starts, {len(classes)} labels and {len(scores)} scores"
        raise _bad(path, number, f"its segments have {counts}.")
    if len(classes) and (min(classes) < 0 or min(starts) < 0):
        raise _bad(path, number, "its segments have a negative start or class.")
    return Ratings(
        ids[0].decode(errors="backslashreplace"),
        np.array(starts, np.int64),
        np.array(classes, np.int64),
        np.array(scores, np.float64) > 0,
    )


def _no_ratings(records: Records) -> RecordError:
    return RecordError(f"{records.paths[0]}: no record has {LABELS.decode()!r}.", hint=HINT)


def _bad(path: Path, number: int, problem: str) -> BadRecord:
    return BadRecord(path, number, problem, kind="segments that do not fit together", hint=HINT)
