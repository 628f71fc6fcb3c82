"""Files of predictions of four videos, and what selecting among them ends with."""

import numpy as np
import pytest
from builders import bytes_by_dtype

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import SelectionError
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.selection.stage import select
from ensemble_kit.store.provenance import FileMetadata, ModelMetadata

MISSING = -np.inf


VIDEOS = ("a", "b", "c", "d")


POSITIVES = [{0}, {1, 4}, {2}, {0, 3}]


def write_own(path, rows, *, ids=VIDEOS, positives=POSITIVES, name=None, size=100, names="vwxyz"):
    """Write predictions of a model that takes ``size`` bytes in bf16; None for no model."""
    file = FileMetadata(path=f"{path.stem}/averaged.safetensors", sha256="a" * 64)
    model = ModelMetadata(
        file=file,
        kind="checkpoint",
        num_values=(size or 0) // 2,
        bytes_by_dtype=bytes_by_dtype(size) if size else None,
        repeats=1,
    )
    write_predictions(
        path,
        ids=ids,
        label_names=tuple(names[: len(rows[0])]),
        labels=LabelLists.from_lists(map(sorted, positives)),
        rows=np.array(rows, np.float32),
        name=name or path.stem,
        model=model if size is not None else None,
        force=True,
    )
    return path


def write_csv(path, rows, ids=VIDEOS):
    lines = ["VideoId,LabelConfidencePairs"]
    for video, row in zip(ids, rows, strict=True):
        listed = [(index, score) for index, score in enumerate(row) if score > MISSING]
        lines.append(f"{video}," + " ".join(f"{index} {score!r}" for index, score in listed))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_labels(path, ids=VIDEOS, positives=POSITIVES):
    lines = [
        f"{video},{' '.join(map(str, sorted(one)))}"
        for video, one in zip(ids, positives, strict=True)
    ]
    path.write_text("\n".join(["VideoId,Labels", *lines]) + "\n", encoding="utf-8")
    return path


def right_for(*videos, score=0.75):
    """Scores of 1/8, but for the positives of some videos."""
    return [
        [score if video in videos and index in positives else 0.125 for index in range(5)]
        for video, positives in zip(VIDEOS, POSITIVES, strict=True)
    ]


def refused(paths, error=SelectionError, **options):
    """Return the message that selecting ends with."""
    output = paths[0].parent / "s.json"
    with pytest.raises(error) as caught:
        select(paths, output=output, **options)
    assert not output.exists()
    return str(caught.value)
