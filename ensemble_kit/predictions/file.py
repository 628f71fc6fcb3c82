"""Predictions files: the kit's own, with every probability or the best, and other tools'.

A predictions file of the kit is a tensor file with ``probabilities`` ``(N, C)`` F32, the labels as
``label_offsets`` and ``label_classes`` I64 (see ``LabelLists``), and the video ids as ``ids`` U8,
UTF-8 joined by newlines; its metadata is a ``PredictionsMetadata``. One that keeps the K best
classes of each video has, in place of ``probabilities``, their ``values`` ``(N, K)`` F32 and
``classes`` ``(N, K)`` I32, best first, and ``bounds`` ``(N,)`` F32, the largest probability that
was left out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ensemble_kit._version import __version__
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import Vocabulary, vocabulary_sha256
from ensemble_kit.errors import CheckpointError, PredictionsError
from ensemble_kit.files import refuse_overwrite, written_aside
from ensemble_kit.metrics import top_classes
from ensemble_kit.predictions.challenge_csv import (
    PREDICTIONS_HEADER,
    PREDICTIONS_HEADERS,
    format_line,
    read_pairs,
)
from ensemble_kit.predictions.numpy_files import read_arrays
from ensemble_kit.predictions.rows import (
    DenseRows,
    Floats,
    ListedRows,
    Rows,
    TopRows,
    as_probabilities,
)
from ensemble_kit.predictions.videos import are_label_lists, dataset_sha256, refuse_ids
from ensemble_kit.store.provenance import ModelMetadata, PredictionsMetadata
from ensemble_kit.store.tensor_files import TensorFile, open_tensors, save_tensors

BLOCK_VALUES = 2**22  # probabilities read together: 16 MiB
COMMON = {"label_offsets": "I64", "label_classes": "I64", "ids": "U8"}
ALL = {"probabilities": "F32", **COMMON}
BEST = {"values": "F32", "classes": "I32", "bounds": "F32", **COMMON}
GZIP = b"\x1f\x8b"
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
    """Return whether a file holds predictions rather than a model.

    Raises:
        CheckpointError: The file is a tensor file, and is damaged.
        PredictionsError: The file cannot be read, or is compressed with gzip.
    """
    form = _form_of(path)
    if form != "tensors":
        return form is not None
    with open_tensors(path) as file:
        return file.kind == "predictions"


def read_predictions(path: Path, *, num_classes: int | None = None) -> Predictions:
    """Open a predictions file of the kit or of NumPy, or read a CSV in the challenge's format.

    Args:
        path: The file. The first bytes say what it is, and where they do not, its suffix.
        num_classes: The most classes that a CSV file may list; None takes any under a million.

    Raises:
        CheckpointError: A tensor file is not a whole predictions file.
        PredictionsError: A file cannot be read, a line of a CSV file is not what it should be, or
            a video appears twice.
    """
    form = _form_of(path)
    if form == "tensors":
        with open_tensors(path) as file:
            return _open_own(file)
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
    return Predictions(path, path.stem, ids, num_classes or largest + 1, ListedRows(pairs))


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
    """Write a predictions file of the kit.

    Args:
        path: The file to write.
        ids: N video ids.
        label_names: C names.
        labels: The labels of N videos; empty lists where they are not known.
        rows: ``(N, C)`` probabilities, or blocks of ``(n, C)`` that follow one another; they are
            stored as float32. A value less than 1e-6 outside of ``[0, 1]``, as rounding makes them,
            is written as 0 or 1.
        name: What selection will call the predictions.
        model: The model that made them, if it is a file of the kit.
        top_k: How many classes of each video to keep, the best; None or C keeps all.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
        PredictionsError: A value is not a probability, or an id appears twice or cannot be kept.
        ValueError: The numbers of videos or of classes do not agree.
    """
    refuse_overwrite(path, force=force)
    refuse_ids(ids, path, forbidden="\n")
    if labels.num_videos != len(ids):
        raise ValueError(f"{len(ids)} ids, labels of {labels.num_videos} videos")
    if top_k is not None and top_k >= len(label_names):
        top_k = None
    tensors = _empty(len(ids), len(label_names), top_k)
    for videos, block in _checked_blocks(rows, ids, path):
        if block.shape[1] != len(label_names):
            raise ValueError(f"{len(label_names)} label names, {block.shape[1]} probabilities")
        _keep(block, videos, tensors, top_k)
    tensors |= {
        "label_offsets": labels.offsets,
        "label_classes": labels.classes,
        "ids": np.frombuffer("\n".join(ids).encode(), np.uint8),
    }
    metadata = PredictionsMetadata(
        kit_version=__version__,
        name=name,
        model=model,
        label_names=tuple(label_names),
        vocabulary_sha256=vocabulary_sha256(label_names),
        dataset_sha256=dataset_sha256(ids, labels),
        top_k=top_k,
    )
    save_tensors(path, tensors, metadata, force=force)


def write_predictions_csv(
    path: Path,
    *,
    ids: Sequence[str],
    rows: Floats | Iterable[Floats],
    top_k: int = 20,
    force: bool,
) -> None:
    """Write the best classes of each video in the challenge's format.

    Confidences are written as ``%g``, six digits, and the other classes are lost: select among
    predictions files of the kit, not among these. It raises what ``write_predictions`` raises.

    Args:
        path: The file to write.
        ids: N video ids.
        rows: ``(N, C)`` probabilities, or blocks of ``(n, C)`` that follow one another.
        top_k: How many classes a video lists, the best first, equal ones by class index.
        force: Whether an existing file may be replaced.
    """
    refuse_overwrite(path, force=force)
    refuse_ids(ids, path, forbidden="\r\n")
    with written_aside(path, force=force) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(f"{PREDICTIONS_HEADER}\n")
        for videos, block in _checked_blocks(rows, ids, path):
            best = zip(ids[videos], *top_classes(block, top_k), strict=True)
            file.writelines(f"{format_line(*line)}\n" for line in best)


def _form_of(path: Path) -> Form | None:
    """Return what form of predictions a file may hold; None for that of no predictions file.

    The content decides before the name, which a browser or a script may have changed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise PredictionsError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error
    header = head.removeprefix(b"\xef\xbb\xbf").splitlines()[:1]
    if header and header[0].decode(errors="replace") in PREDICTIONS_HEADERS:
        return "csv"
    if head[8:9] == b"{":  # after the header's length, the header's JSON
        return "tensors"
    if head.startswith(GZIP):
        raise PredictionsError(
            f"{path} is compressed with gzip.", hint="Unpack it first, with gunzip."
        )
    return FORMS.get(path.suffix.lower())


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


def _empty(num_videos: int, num_classes: int, top_k: int | None) -> dict[str, NDArray[Any]]:
    """Return room for what a file keeps, by the names of its tensors."""
    if top_k is None:
        return {"probabilities": np.empty((num_videos, num_classes), np.float32)}
    return {
        "values": np.empty((num_videos, top_k), np.float32),
        "classes": np.empty((num_videos, top_k), np.int32),
        "bounds": np.empty(num_videos, np.float32),
    }


def _keep(
    block: Floats, videos: slice, tensors: dict[str, NDArray[Any]], top_k: int | None
) -> None:
    """Put what a file keeps of some videos in its place."""
    if top_k is None:
        tensors["probabilities"][videos] = block
        return
    classes, values = top_classes(block.astype(np.float32, copy=False), top_k + 1)
    tensors["values"][videos] = values[:, :-1]
    tensors["classes"][videos] = classes[:, :-1]
    tensors["bounds"][videos] = values[:, -1]


def _checked_blocks(
    rows: Floats | Iterable[Floats], ids: Sequence[str], path: Path
) -> Iterator[tuple[slice, Floats]]:
    start = 0
    for block in [rows] if isinstance(rows, np.ndarray) else rows:
        videos = slice(start, start + len(block))
        yield videos, as_probabilities(block, ids[videos], path)
        start = videos.stop
    if start != len(ids):
        raise ValueError(f"{len(ids)} ids, probabilities of {start} videos")
