"""Figures of some records."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.kinds import title_of


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
