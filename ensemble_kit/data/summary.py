"""Figures of some records."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.kinds import title_of

REPEATS_SHOWN = 5  # ids that occur more than once, named with their places


class Repeat(NamedTuple):
    """An id that several records have.

    Attributes:
        id: The id.
        places: File and number, from 1, of each record that has it.
    """

    id: str
    places: tuple[tuple[Path, int], ...]


class Checked(NamedTuple):
    """What reading all records found.

    Attributes:
        num_good: How many records are good.
        num_unlabelled: How many of them have no key of labels.
        num_repeated: How many ids occur more than once.
        repeats: The first ``REPEATS_SHOWN`` of those, in the order of the files.
    """

    num_good: int
    num_unlabelled: int
    num_repeated: int
    repeats: tuple[Repeat, ...]


def check_records(records: Records) -> Checked:
    """Read all records, and find the ids that occur more than once.

    Of each id, eight bytes of a hash are kept: YouTube-8M's six million take 49 MB. Where some are
    the same, the records are read once more, for the ids themselves and their places.

    Raises:
        RecordError: As ``Records.videos``.
    """
    hashes, num_unlabelled = array("Q"), 0
    for video in records.videos():
        hashes.append(_hash_of(video.id))
        num_unlabelled += not video.is_labelled
    values, counts = np.unique(np.array(hashes, np.uint64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    repeats = _repeats(records, suspects) if suspects else ()
    return Checked(len(hashes), num_unlabelled, len(suspects), repeats)


def _repeats(records: Records, suspects: set[int]) -> tuple[Repeat, ...]:
    places: dict[str, list[tuple[Path, int]]] = {}
    for path, number, video in records.placed_videos():
        is_suspect = _hash_of(video.id) in suspects
        if is_suspect and (video.id in places or len(places) < REPEATS_SHOWN):
            places.setdefault(video.id, []).append((path, number))
    return tuple(Repeat(video, tuple(where)) for video, where in places.items())


def _hash_of(video: str) -> int:
    digest = hashlib.blake2b(video.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def summarise(records: Records) -> dict[str, Any]:
    """Read all records and return their figures, ready for JSON.

    Returns:
        ``kind``, ``modalities``, ``num_classes``, ``files``, ``records`` and ``skipped``;
        ``unlabelled``, the records without the key of labels;
        ``frames`` and ``labels`` with ``total``, ``min``, ``max`` and ``mean`` over the videos;
        ``classes`` with ``index``, ``name`` and ``videos`` of each class seen, frequent ones first.
    """
    num_frames, num_labels, num_unlabelled = [], [], 0
    videos_of: Counter[int] = Counter()
    for video in records.videos():
        num_frames.append(video.num_frames)
        num_labels.append(len(video.classes))
        num_unlabelled += not video.is_labelled
        videos_of.update(video.classes.tolist())
    names = records.schema.names
    return {
        "kind": title_of(records.schema),
        "modalities": [modality.model_dump() for modality in records.schema.modalities],
        "num_classes": records.schema.num_classes,
        "files": len(records.paths),
        "records": len(num_frames),
        "skipped": records.num_skipped,
        "unlabelled": num_unlabelled,
        "frames": _spread(num_frames),
        "labels": _spread(num_labels),
        "classes": [
            {"index": index, "name": names[index], "videos": count}
            for index, count in sorted(videos_of.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def _spread(counts: Sequence[int]) -> dict[str, float]:
    total = sum(counts)
    return {
        "total": total,
        "min": min(counts, default=0),
        "max": max(counts, default=0),
        "mean": total / max(1, len(counts)),
    }
