"""Predictions that another tool left as NumPy's ``.npy`` or ``.npz``. Nothing is unpickled.

``scores.npy`` is a matrix ``(N, C)``, with the video ids beside it in ``scores.ids.txt``, one a
line. An ``.npz`` has the matrix as ``probabilities`` and the ids as ``ids``; it may have the labels
too, as ``labels`` ``(N, C)``, positive where greater than 0, and the classes' names as
``label_names``.
"""

import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError
from ensemble_kit.store.row_files import RowFile

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
LOCAL_HEADER = 30  # bytes before a member's name in a ZIP file; lengths of name and rest end it


class Arrays(NamedTuple):
    """What such a file holds of N videos.

    Attributes:
        ids: The videos.
        matrix: ``(N, C)``, floating point; on disk, unless it is compressed there.
        labels: Their labels, if it tells.
        label_names: The classes' names, if it tells.
    """

    ids: tuple[str, ...]
    matrix: RowFile | NDArray[Any]
    labels: LabelLists | None
    label_names: tuple[str, ...] | None


def read_arrays(path: Path) -> Arrays:
    """Open a ``.npy`` or ``.npz`` file of probabilities.

    Raises:
        PredictionsError: The file cannot be read, lacks an array, or has one of another shape or
            type.
    """
    try:
        return _read_npy(path) if path.suffix == ".npy" else _read_npz(path)
    except OSError as error:
        raise PredictionsError(
            f"{error.filename or path} cannot be read: {error.strerror}.",
            hint="Name a file that you may read.",
        ) from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise PredictionsError(
            f"{path} is not a whole file of NumPy's: {str(error).rstrip('.')}.",
            hint="Save it again with np.save or np.savez; objects are never unpickled.",
        ) from error


def _read_npy(path: Path) -> Arrays:
    ids_path = path.with_suffix(".ids.txt")
    with path.open("rb") as file:
        matrix = _matrix(file, path)
    if not ids_path.is_file():
        raise PredictionsError(
            f"{path}: there are no video ids, expected {ids_path.name} beside it.",
            hint="Write them there, one a line, in the order of the rows.",
        )
    ids = tuple(ids_path.read_text(encoding="utf-8").splitlines())
    _refuse_shape(ids_path, "ids", (len(ids),), matrix.shape[:1])
    return Arrays(ids, matrix, None, None)


def _read_npz(path: Path) -> Arrays:
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
        for name in ("probabilities", "ids"):
            if name not in arrays.files:
                raise PredictionsError(
                    f"{path} has no array {name!r}, only {', '.join(arrays.files) or 'nothing'}.",
                    hint="Save it with np.savez(path, probabilities=..., ids=...).",
                )
        member = archive.getinfo("probabilities.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                file.seek(member.header_offset + LOCAL_HEADER - 4)
                lengths = np.frombuffer(file.read(4), "<u2")
                file.seek(int(lengths.sum()), 1)
                matrix = _matrix(file, path)
        else:
            matrix = _floating(arrays["probabilities"], path)
        num_videos, num_classes = matrix.shape
        ids = arrays["ids"]
        _refuse_shape(path, "ids", ids.shape, (num_videos,))
        labels, label_names = None, None
        if "labels" in arrays.files:
            positive = arrays["labels"]
            _refuse_shape(path, "labels", positive.shape, matrix.shape)
            videos, classes = np.nonzero(positive > 0)
            offsets = np.searchsorted(videos, np.arange(num_videos + 1))
            labels = LabelLists(offsets.astype(np.int64), classes.astype(np.int64))
        if "label_names" in arrays.files:
            label_names = tuple(arrays["label_names"].astype(str).tolist())
            _refuse_shape(path, "label_names", (len(label_names),), (num_classes,))
    return Arrays(tuple(ids.astype(str).tolist()), matrix, labels, label_names)


def _matrix(file: IO[bytes], path: Path) -> RowFile | NDArray[Any]:
    """Return the matrix whose header the file stands at, unless it is stored by columns."""
    start = file.tell()
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_by_columns, dtype = read(file)
    if is_by_columns or len(shape) != 2 or dtype.kind != "f":
        file.seek(start)
        return _floating(np.lib.format.read_array(file, allow_pickle=False), path)
    return RowFile(path, file.tell(), dtype.str, (shape[0], shape[1]))


def _floating(array: NDArray[Any], path: Path) -> NDArray[Any]:
    if array.ndim != 2 or array.dtype.kind != "f":
        raise PredictionsError(
            f"{path}: the probabilities are {array.dtype} of shape {array.shape}, expected "
            "floating-point numbers of shape (videos, classes).",
            hint="Save one row of probabilities for each video.",
        )
    return array


def _refuse_shape(path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise PredictionsError(
            f"{path}: {name} have shape {found}, expected {expected} as the probabilities have.",
            hint="Save one row of probabilities for each video, one column for each class.",
        )
