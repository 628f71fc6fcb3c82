"""Predictions files: the kit's own, with every probability or the best, and other tools'.

A predictions file of the kit is a tensor file with ``probabilities`` ``(N, C)`` F32, the labels as
``label_offsets`` and ``label_classes`` I64 (see ``LabelLists``), and the video ids as ``ids`` U8,
UTF-8 joined by newlines; its metadata is a ``PredictionsMetadata``. One that keeps the K best
classes of each video has, in place of ``probabilities``, their ``values`` ``(N, K)`` F32 and
``classes`` ``(N, K)`` I32, best first, and ``bounds`` ``(N,)`` F32, the largest probability that
was left out.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os.path import isdir
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.csv_lines import header_of
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import Vocabulary
from ensemble_kit.errors import CheckpointError, PredictionsError
from ensemble_kit.gzipped import GZIP, expanded
from ensemble_kit.predictions.challenge_csv import PREDICTIONS_HEADERS, read_pairs
from ensemble_kit.predictions.folder import differing, shard_paths
from ensemble_kit.predictions.numpy_files import read_arrays
from ensemble_kit.predictions.rows import (
    DenseRows,
    Floats,
    JoinedRows,
    ListedRows,
    Rows,
    TopRows,
    as_probabilities,
)
from ensemble_kit.predictions.videos import are_label_lists, dataset_sha256, joined, refuse_ids
from ensemble_kit.store.provenance import PredictionsMetadata
from ensemble_kit.store.tensor_files import TensorFile, open_tensors

BLOCK_VALUES = 2**22  # probabilities read together: 16 MiB
COMMON = {"label_offsets": "I64", "label_classes": "I64", "ids": "U8"}
ALL = {"probabilities": "F32", **COMMON}
BEST = {"values": "F32", "classes": "I32", "bounds": "F32", **COMMON}
Form = Literal["tensors", "numpy", "csv"]
FORMS: Mapping[str, Form] = MappingProxyType(
    {".safetensors": "tensors", ".npy": "numpy", ".npz": "numpy", ".csv": "csv", ".txt": "csv"}
)


@dataclass(frozen=True)
class Predictions:
    """Predictions that lie in a file; their probabilities are read when they are asked for.

    Attributes:
        path: The file.
        name: What selection calls them: the name in the metadata, or the stem of another tool's
            file.
        ids: The N videos, in order.
        num_classes: C; for a CSV file of unknown classes, one more than its largest class.
        source: Where the probabilities are.
        label_names: The classes' names; None where the file has none.
        labels: The videos' labels; None where the file has none.
        metadata: What the file says of itself; None for another tool's file.
    """

    path: Path
    name: str
    ids: tuple[str, ...]
    num_classes: int
    source: Rows
    label_names: tuple[str, ...] | None = None
    labels: LabelLists | None = None
    metadata: PredictionsMetadata | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes."""
        return Vocabulary(self.num_classes, self.label_names)

    @property
    def is_sparse(self) -> bool:
        """Whether the file lists only some classes of each video."""
        return self.source.bounds is not None

    @property
    def knows_classes(self) -> bool:
        """Whether the file says how many classes there are; a CSV file does not."""
        return not isinstance(self.source, ListedRows)

    @property
    def home(self) -> Path:
        """The folder that paths in its metadata are relative to."""
        return self.path if isdir(self.path) else self.path.parent

    def taken(self, places: NDArray[np.int64]) -> Floats:
        """Return the probabilities of some videos.

        Args:
            places: ``(n,)``, where in the file they are.

        Returns:
            ``(n, C)``, float32, or float64 where the file has float64 numbers or text; ``-inf``
            where it does not list a class.

        Raises:
            PredictionsError: The file has gone, or a value is not a probability.
        """
        rows, are_probabilities = self.source.read(places, self.num_classes)
        if are_probabilities:
            return rows
        return as_probabilities(rows, [self.ids[place] for place in places], self.path)

    def rows(self, start: int, stop: int) -> Floats:
        """Return the probabilities of videos ``start`` to ``stop - 1``; see ``taken``."""
        return self.taken(np.arange(start, stop))

    def blocks(self, block_values: int = BLOCK_VALUES) -> Iterator[tuple[slice, Floats]]:
        """Yield all probabilities, some videos at a time: which videos, and their rows.

        Args:
            block_values: About how many probabilities to read together.
        """
        step = max(1, block_values // self.num_classes)
        for start in range(0, len(self.ids), step):
            stop = min(start + step, len(self.ids))
            yield slice(start, stop), self.rows(start, stop)


def is_predictions_file(path: Path) -> bool:
    """Return whether a file, or a folder of files, holds predictions rather than a model.

    Raises:
        CheckpointError: The file is a tensor file, and is damaged.
        PredictionsError: The file cannot be read, or is gzipped and no CSV file.
    """
    if isdir(path):
        return True
    form = _form_of(path)
    if form != "tensors":
        return form is not None
    with open_tensors(path) as file:
        return file.kind == "predictions"


def read_predictions(path: Path, *, num_classes: int | None = None) -> Predictions:
    """Open predictions of the kit or of NumPy, or read a CSV in the challenge's format.

    Args:
        path: The file, whose first bytes say what it is, and where they do not, its suffix; or a
            folder with a predictions file for each file of records.
        num_classes: The most classes that a CSV file may list; None takes any under a million.

    Raises:
        CheckpointError: A tensor file is not a whole predictions file.
        PredictionsError: A file cannot be read, a line of a CSV file is not what it should be, or
            a video appears twice.
    """
    if isdir(path):
        return _open_folder(path)
    form = _form_of(path)
    if form == "tensors":
        return read_own(path)
    if form == "numpy":
        arrays = read_arrays(path)
        refuse_ids(arrays.ids, path, forbidden="")
        return Predictions(
            path,
            path.stem,
            arrays.ids,
            arrays.matrix.shape[1],
            DenseRows(arrays.matrix),
            arrays.label_names,
            arrays.labels,
        )
    ids, pairs = read_pairs(path, num_classes=num_classes)
    largest = int(pairs.classes.max(initial=0))
    name = Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem
    return Predictions(path, name, ids, num_classes or largest + 1, ListedRows(pairs))


def read_own(path: Path) -> Predictions:
    """Open predictions of the kit, whose ``metadata`` is never None.

    Raises:
        CheckpointError: The file is anything else.
    """
    with open_tensors(path) as file:
        return _open_own(file)


def _form_of(path: Path) -> Form | None:
    """Return what form of predictions a file may hold; None for that of no predictions file.

    The content decides before the name, which a browser or a script may have changed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(256)
            if head.startswith(GZIP):
                file.seek(0)
                with expanded(file, os.fstat(file.fileno()).st_size) as stream:
                    head = stream.read(256)
                if _first_line(head) not in PREDICTIONS_HEADERS:
                    raise PredictionsError(
                        f"{path} is compressed with gzip, and is no CSV file of predictions.",
                        hint="Unpack it first, with gunzip.",
                    )
    except OSError as error:
        raise PredictionsError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error
    if _first_line(head) in PREDICTIONS_HEADERS:
        return "csv"
    if head[8:9] == b"{":  # after the header's length, the header's JSON
        return "tensors"
    return FORMS.get(path.suffix.lower())


def _first_line(head: bytes) -> str:
    lines = head.removeprefix(b"\xef\xbb\xbf").splitlines()
    return header_of(lines[0].decode(errors="replace")) if lines else ""


def _open_folder(folder: Path) -> Predictions:
    """Open the files of a folder as one, in the order of their names."""
    parts = [read_own(path) for path in shard_paths(folder)]
    first = parts[0]
    assert first.metadata is not None
    for part in parts[1:]:
        difference = difference_of(part, first)
        if difference is not None:
            raise PredictionsError(
                f"{part.path} was made {difference} than {first.path}.",
                hint="Remove what is out of date, and run the same `ensemble-kit predict` again.",
            )
    ids = tuple(video for part in parts for video in part.ids)
    refuse_ids(ids, folder, forbidden="")
    labels = joined([part.labels for part in parts if part.labels is not None])
    metadata = first.metadata.model_copy(
        update={"dataset_sha256": dataset_sha256(ids, labels), "shard": None}
    )
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    source = JoinedRows(tuple(part.source for part in parts), starts)
    return replace(first, path=folder, ids=ids, source=source, labels=labels, metadata=metadata)


def difference_of(part: Predictions, other: Predictions) -> str | None:
    """Return how two files of a folder were made differently, such as ``by another model``."""
    ours, theirs = part.metadata, other.metadata
    assert ours is not None
    assert theirs is not None
    model, its_model = ours.model, theirs.model
    return differing(
        (
            ("by another model", model and model.file.sha256, its_model and its_model.file.sha256),
            ("with other repeats", model and model.repeats, its_model and its_model.repeats),
            ("with other classes", ours.vocabulary_sha256, theirs.vocabulary_sha256),
            ("with another --top-k", ours.top_k, theirs.top_k),
        )
    )


def _open_own(file: TensorFile) -> Predictions:
    metadata = file.metadata_as(PredictionsMetadata)
    names = metadata.label_names
    types = {name: spec.dtype for name, spec in file.specs.items()}
    if types in (ALL, BEST):
        labels = LabelLists(file.array("label_offsets"), file.array("label_classes"))
        text = file.array("ids").tobytes().decode(errors="replace")
        ids = tuple(text.split("\n")) if labels.offsets.size > 1 else ()
        wide, kept = (len(ids), len(names)), (len(ids), metadata.top_k or 0)
        shapes = (
            {"probabilities": wide}
            if types == ALL
            else {"values": kept, "classes": kept, "bounds": kept[:1]}
        )
        if (
            all(file.specs[name].shape == shape for name, shape in shapes.items())
            and are_label_lists(labels, len(ids), len(names))
            and dataset_sha256(ids, labels) == metadata.dataset_sha256
        ):
            refuse_ids(ids, file.path, forbidden="")
            source: Rows = (
                DenseRows(file.rows("probabilities"))
                if types == ALL
                else TopRows(file.rows("values"), file.rows("classes"), file.array("bounds"))
            )
            return Predictions(
                file.path, metadata.name, ids, len(names), source, names, labels, metadata
            )
    raise CheckpointError(
        f"{file.path} does not hold the videos and labels that its metadata describes.",
        hint="Make the file again with `ensemble-kit predict`.",
    )
