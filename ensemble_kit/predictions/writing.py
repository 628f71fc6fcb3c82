"""Predictions written as they come: what is in memory does not grow with the number of videos.

Of each video eight bytes are kept, by which an id that comes twice is found.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from ensemble_kit._version import __version__
from ensemble_kit.choices import TOP_K
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import vocabulary_sha256
from ensemble_kit.errors import OutputError
from ensemble_kit.files import refuse_overwrite, refuse_standard_output, written_aside
from ensemble_kit.metrics import top_classes
from ensemble_kit.predictions.challenge_csv import PREDICTIONS_HEADER, format_line
from ensemble_kit.predictions.rows import DenseRows, Floats, Rows, TopRows, as_probabilities
from ensemble_kit.predictions.videos import IdCheck, refuse_ids
from ensemble_kit.store.growing_file import GrowingFile
from ensemble_kit.store.provenance import (
    NO_HASH,
    ModelMetadata,
    PredictionsMetadata,
    ShardMetadata,
)
from ensemble_kit.store.tensor_files import TensorSpec

SUFFIXES = (".safetensors", ".csv")


def require_suffix(output: Path) -> None:
    """Raise ``OutputError`` unless predictions are written in a file's format, by its suffix."""
    refuse_standard_output(output)
    if output.suffix.lower() not in SUFFIXES:
        raise OutputError(
            f"{output} does not end in .safetensors or .csv, and predictions are written in no "
            "other format.",
            hint="Name a .safetensors file, or a .csv file for the challenge's format.",
        )


class PredictionsWriter(Protocol):
    """Takes predictions, some videos at a time."""

    def add(self, ids: Sequence[str], labels: LabelLists, rows: Floats) -> None:
        """Write the next videos.

        Args:
            ids: n video ids.
            labels: Their labels; empty lists where they are not known.
            rows: ``(n, C)`` probabilities. A value less than 1e-6 outside of ``[0, 1]``, as
                rounding makes them, is written as 0 or 1.

        Raises:
            PredictionsError: A value is not a probability, or an id cannot be kept.
            ValueError: The numbers of videos or of classes do not agree.
        """


@contextmanager
def predictions_written(
    path: Path,
    *,
    label_names: Sequence[str],
    name: str,
    model: ModelMetadata | None,
    top_k: int | None = None,
    shard: ShardMetadata | None = None,
    force: bool,
) -> Iterator["FileWriter"]:
    """Write a predictions file of the kit; what is added in the block is in it.

    Args:
        path: The file to write.
        label_names: C names.
        name: What selection will call the predictions.
        model: The model that made them, if it is a file of the kit.
        top_k: How many classes of each video to keep, the best; None or C keeps all.
        shard: The file of records that they were made from, if it is one of a folder of such.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
        PredictionsError: An id came twice.
    """
    if top_k is not None and top_k >= len(label_names):
        top_k = None
    metadata = PredictionsMetadata(
        kit_version=__version__,
        name=name,
        model=model,
        label_names=tuple(label_names),
        vocabulary_sha256=vocabulary_sha256(label_names),
        dataset_sha256=NO_HASH,
        top_k=top_k,
        shard=shard,
    )
    with (
        written_aside(path, force=force) as aside,
        GrowingFile(aside, path.parent, _specs(len(label_names), top_k), metadata) as file,
    ):
        writer = FileWriter(path, file, metadata)
        yield writer
        writer.finish()


def _specs(num_classes: int, top_k: int | None) -> dict[str, TensorSpec]:
    """Return the tensors of a file, and one row of each; the largest is the first."""
    kept = (
        {"probabilities": TensorSpec("F32", (num_classes,))}
        if top_k is None
        else {
            "values": TensorSpec("F32", (top_k,)),
            "classes": TensorSpec("I32", (top_k,)),
            "bounds": TensorSpec("F32", ()),
        }
    )
    return kept | {
        "label_offsets": TensorSpec("I64", ()),
        "label_classes": TensorSpec("I64", ()),
        "ids": TensorSpec("U8", ()),
    }


class FileWriter:
    """Writes a predictions file of the kit; see ``predictions_written``."""

    def __init__(self, path: Path, file: GrowingFile, metadata: PredictionsMetadata) -> None:
        self._path = path
        self._file = file
        self._metadata = metadata
        self._ids = IdCheck(path, forbidden="\n")
        self._num_labels = 0
        self.num_videos = 0
        file.append("label_offsets", np.zeros(1, np.int64))

    def add(self, ids: Sequence[str], labels: LabelLists, rows: Floats) -> None:
        """Write the next videos; see ``PredictionsWriter``."""
        num_classes = len(self._metadata.label_names)
        if rows.shape[1] != num_classes:
            raise ValueError(f"{num_classes} label names, {rows.shape[1]} probabilities")
        rows = as_probabilities(rows, ids, self._path).astype(np.float32, copy=False)
        top_k = self._metadata.top_k
        if top_k is None:
            self._file.append("probabilities", rows)
        else:
            classes, values = top_classes(rows, top_k + 1)
            self._file.append("values", values[:, :-1])
            self._file.append("classes", classes[:, :-1].astype(np.int32))
            self._file.append("bounds", np.ascontiguousarray(values[:, -1]))
        self._add_videos(ids, labels)

    def copy(
        self, ids: Sequence[str], labels: LabelLists, source: Rows, places: NDArray[np.int64]
    ) -> None:
        """Write videos of another file of the kit that keeps as many classes, as they are there.

        Args:
            ids: n video ids.
            labels: Their labels.
            source: Where their probabilities lie.
            places: ``(n,)``, where in it they are.
        """
        if isinstance(source, DenseRows):
            rows, _ = source.read(places, len(self._metadata.label_names))
            self._file.append("probabilities", rows)
        else:
            assert isinstance(source, TopRows)
            self._file.append("values", source.values.read(places))
            self._file.append("classes", source.classes.read(places))
            self._file.append("bounds", source.bounds[places])
        self._add_videos(ids, labels)

    def _add_videos(self, ids: Sequence[str], labels: LabelLists) -> None:
        if labels.num_videos != len(ids):
            raise ValueError(f"{len(ids)} ids, labels of {labels.num_videos} videos")
        self._ids.add(ids)
        if ids:
            self._file.append("ids", ("\n" if self.num_videos else "").encode())
            self._file.append("ids", "\n".join(ids).encode())
        self._file.append("label_offsets", labels.offsets[1:] + self._num_labels)
        self._file.append("label_classes", labels.classes)
        self._num_labels += int(labels.offsets[-1])
        self.num_videos += len(ids)

    def finish(self) -> None:
        """Complete the file. Nothing is added after this.

        Raises:
            PredictionsError: An id came twice.
        """
        self._ids.finish(_lines(self._file.blocks("ids")))
        digest = hashlib.sha256()  # as `dataset_sha256` computes it of arrays in memory
        for number, name in enumerate(("ids", "label_offsets", "label_classes")):
            digest.update(b"\n" if number else b"")
            for block in self._file.blocks(name):
                digest.update(block)
        self._file.finish(self._metadata.model_copy(update={"dataset_sha256": digest.hexdigest()}))


def _lines(blocks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode() for line in lines)
    yield rest.decode()


@contextmanager
def csv_written(
    path: Path, *, top_k: int, classes: NDArray[np.int64] | None = None, force: bool
) -> Iterator["CsvWriter"]:
    """Write a CSV file in the challenge's format; what is added in the block is in it.

    Confidences in float32 are written as ``%g``, six digits, those in float64 with all digits. The
    other classes are lost: select among predictions files of the kit, not among these.

    Args:
        path: The file to write.
        top_k: How many classes a video lists, the best first, equal ones by class index.
        classes: ``(C,)``, ascending: the class of each column; None where column i is class i.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
        PredictionsError: An id came twice.
    """
    with (
        written_aside(path, force=force) as aside,
        aside.open("w", encoding="utf-8") as file,
        tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n", dir=path.parent) as ids,
    ):
        file.write(f"{PREDICTIONS_HEADER}\n")
        writer = CsvWriter(path, file, ids, top_k, classes)
        yield writer
        writer.finish()


class CsvWriter:
    """Writes a CSV file in the challenge's format; see ``csv_written``."""

    def __init__(
        self,
        path: Path,
        file: IO[str],
        ids: IO[str],
        top_k: int,
        classes: NDArray[np.int64] | None,
    ) -> None:
        self._path = path
        self._file = file
        self._written = ids
        self._top_k = top_k
        self._classes = classes
        self._ids = IdCheck(path, forbidden="\r\n")

    def add(self, ids: Sequence[str], labels: LabelLists, rows: Floats) -> None:
        """Write the next videos, without their labels; see ``PredictionsWriter``."""
        self._ids.add(ids)
        rows = as_probabilities(rows, ids, self._path)
        columns, confidences = top_classes(rows, self._top_k)
        classes = columns if self._classes is None else self._classes[columns]
        best = zip(ids, classes, confidences, strict=True)
        self._file.writelines(f"{format_line(*line)}\n" for line in best)
        self._written.writelines(f"{video}\n" for video in ids)

    def finish(self) -> None:
        """Refuse an id that came twice."""
        self._written.seek(0)
        self._ids.finish(line.removesuffix("\n") for line in self._written)


def write_predictions(
    path: Path,
    *,
    ids: Sequence[str],
    label_names: Sequence[str],
    labels: LabelLists,
    rows: Floats | Iterable[Floats],
    name: str,
    model: ModelMetadata | None,
    top_k: int | None = None,
    force: bool,
) -> None:
    """Write a predictions file of videos that are all known; see ``predictions_written``.

    Args:
        path: The file to write.
        ids: N video ids.
        label_names: C names.
        labels: The labels of N videos; empty lists where they are not known.
        rows: ``(N, C)`` probabilities, or blocks of ``(n, C)`` that follow one another; they are
            stored as float32.
        name: What selection will call the predictions.
        model: The model that made them, if it is a file of the kit.
        top_k: How many classes of each video to keep, the best; None or C keeps all.
        force: Whether an existing file may be replaced.
    """
    refuse_overwrite(path, force=force)
    refuse_ids(ids, path, forbidden="\n")
    with predictions_written(
        path, label_names=label_names, name=name, model=model, top_k=top_k, force=force
    ) as writer:
        _add_all(writer, ids, labels, rows)


def write_predictions_csv(
    path: Path,
    *,
    ids: Sequence[str],
    rows: Floats | Iterable[Floats],
    top_k: int = TOP_K,
    force: bool,
) -> None:
    """Write the best classes of videos that are all known; see ``csv_written``.

    Args:
        path: The file to write.
        ids: N video ids.
        rows: ``(N, C)`` probabilities, or blocks of ``(n, C)`` that follow one another.
        top_k: How many classes a video lists, the best first, equal ones by class index.
        force: Whether an existing file may be replaced.
    """
    refuse_overwrite(path, force=force)
    refuse_ids(ids, path, forbidden="\r\n")
    with csv_written(path, top_k=top_k, force=force) as writer:
        _add_all(writer, ids, LabelLists.from_lists([[]] * len(ids)), rows)


def _add_all(
    writer: PredictionsWriter,
    ids: Sequence[str],
    labels: LabelLists,
    rows: Floats | Iterable[Floats],
) -> None:
    if labels.num_videos != len(ids):
        raise ValueError(f"{len(ids)} ids, labels of {labels.num_videos} videos")
    start = 0
    for block in [rows] if isinstance(rows, np.ndarray) else rows:
        stop = start + len(block)
        writer.add(ids[start:stop], labels.rows(start, stop), block)
        start = stop
    if start != len(ids):
        raise ValueError(f"{len(ids)} ids, probabilities of {start} videos")
