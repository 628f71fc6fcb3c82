"""Predictions that another tool left as NumPy's ``.npy`` or ``.npz``. Nothing is unpickled.

``scores.npy`` is a matrix ``(N, C)``, with the video ids beside it in ``scores.ids.txt``, one on
each line, all in double quotes or none. An ``.npz`` has the matrix as ``probabilities`` and the ids
as ``ids``; it may also have the labels as ``labels`` ``(N, C)``, positive where greater than 0, and
the classes' names as ``label_names``.

A matrix that lies in the file row by row and uncompressed is read from there a few rows at a time.
Arrays are read here and not by ``np.load``, which believes a header: one that claims 10^12 columns,
or a small compressed member that unpacks to many gigabytes, would take all memory before anything
is looked at. Every size is compared with what the file has, and what is unpacked into memory is
limited to ``MAX_UNPACKED`` bytes a file.
"""

import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from os import SEEK_CUR, SEEK_END
from os.path import isfile
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError
from ensemble_kit.files import format_size
from ensemble_kit.store.row_files import RowFile
from ensemble_kit.wording import counted

LOCAL_HEADER = 30  # bytes before a member's name in a ZIP file; lengths of name and rest end it
MAX_UNPACKED = 2 * 2**30  # 139,000 videos of 3,862 classes in float32
NAMES = ("probabilities", "ids", "labels", "label_names")
QUOTED = re.compile('"[^"]*"')
FLOATS = frozenset({"float16", "float32", "float64"})


class Arrays(NamedTuple):
    """What such a file holds of N videos.

    Attributes:
        ids: The videos.
        matrix: ``(N, C)``, floating point; on disk, unless it is compressed or lies by columns.
        labels: Their labels, if the file has them.
        label_names: The classes' names, if the file has them.
    """

    ids: tuple[str, ...]
    matrix: RowFile | NDArray[Any]
    labels: LabelLists | None
    label_names: tuple[str, ...] | None


class _Header(NamedTuple):
    """What a ``.npy`` file, or a member of an ``.npz``, says of the array after its header."""

    shape: tuple[int, ...]
    is_by_columns: bool
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """The bytes that the array must have."""
        return prod(self.shape) * self.dtype.itemsize


def read_arrays(path: Path, *, max_unpacked: int = MAX_UNPACKED) -> Arrays:
    """Open a ``.npy`` or ``.npz`` file of probabilities.

    Args:
        path: The file; its suffix says which of the two it is.
        max_unpacked: Maximum size of compressed arrays that are unpacked into memory, in bytes.

    Raises:
        PredictionsError: The file cannot be read, lacks an array, has one of another shape or type,
            or unpacks to more than ``max_unpacked``.
    """
    try:
        if path.suffix.lower() == ".npz":
            return _read_npz(path, max_unpacked)
        return _read_npy(path)
    except PredictionsError:
        raise
    except OSError as error:
        raise PredictionsError(
            f"{error.filename or path} cannot be read: {error.strerror or error}.",
            hint="Name a file that you may read.",
        ) from error
    except Exception as error:  # a damaged header makes zipfile, zlib and NumPy raise many kinds
        said = error.args[0] if isinstance(error, TokenError) else error  # it has a place as well
        reason = str(said).strip().rstrip(".") or type(error).__name__
        raise PredictionsError(
            f"{path} is not a whole NumPy file: {reason[:200]}.",
            hint="Save it again with np.save or np.savez.",
        ) from error


def _read_npy(path: Path) -> Arrays:
    with path.open("rb") as file:
        end = file.seek(0, SEEK_END)
        file.seek(0)
        matrix = _matrix(file, end, path)
    ids = _read_ids(path.with_suffix(".ids.txt"), path)
    if len(ids) != matrix.shape[0]:
        raise PredictionsError(
            f"{path.with_suffix('.ids.txt')} has {counted(len(ids), 'id')}, but {path} has "
            f"{counted(matrix.shape[0], 'row')}.",
            hint="Write one id for each row, in the order of the rows.",
        )
    return Arrays(ids, matrix, None, None)


def _read_ids(path: Path, matrix_path: Path) -> tuple[str, ...]:
    if not isfile(path):
        raise PredictionsError(
            f"{matrix_path}: there are no video ids, expected {path.name} beside it.",
            hint="Write them there, one on each line, in the order of the rows.",
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PredictionsError(
            f"{path} is not text in UTF-8.", hint="Save it as UTF-8, one id on each line."
        ) from error
    # not str.splitlines, which would also split ids at rare characters such as U+2028
    ids = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    if all(QUOTED.fullmatch(each) for each in ids):  # as writers of CSV files leave them
        ids = [each[1:-1] for each in ids]
    return tuple(ids)


def _read_npz(path: Path, max_unpacked: int) -> Arrays:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        for name in ("probabilities.npy", "ids.npy"):
            if name not in members:
                raise PredictionsError(
                    f"{path} has no member {name}, only {', '.join(members)[:200] or 'nothing'}.",
                    hint="Save it with np.savez(path, probabilities=..., ids=...).",
                )
        _refuse_bomb(path, members, max_unpacked)
        matrix = _matrix_of(archive, members["probabilities.npy"], path)
        num_videos, num_classes = matrix.shape
        ids = _array_of(archive, members["ids.npy"], path)
        _refuse_shape(path, "ids", ids.shape, (num_videos,), matrix.shape)
        labels, label_names = None, None
        if "labels.npy" in members:
            positive = _array_of(archive, members["labels.npy"], path)
            _refuse_shape(path, "labels", positive.shape, matrix.shape, matrix.shape)
            labels = _label_lists(positive, path)
        if "label_names.npy" in members:
            names = _array_of(archive, members["label_names.npy"], path)
            _refuse_shape(path, "label_names", names.shape, (num_classes,), matrix.shape)
            label_names = _texts(names, "label_names", path)
            _refuse_names(label_names, path)
    return Arrays(_texts(ids, "ids", path), matrix, labels, label_names)


def _refuse_bomb(path: Path, members: Mapping[str, zipfile.ZipInfo], max_unpacked: int) -> None:
    """Raise if what is compressed would take too much memory; what is stored is on the disk."""
    wanted = (members.get(f"{name}.npy") for name in NAMES)
    unpacked = sum(
        info.file_size
        for info in wanted
        if info is not None and info.compress_type != zipfile.ZIP_STORED
    )
    if unpacked > max_unpacked:
        raise PredictionsError(
            f"{path} would unpack to {format_size(unpacked)}; the limit is "
            f"{format_size(max_unpacked)}.",
            hint="Save it with np.savez, which does not compress; it is then read from the disk.",
        )


def _header(file: IO[bytes]) -> _Header:
    """Read the header that the file stands at.

    Raises:
        ValueError: It is no header of an array of plain numbers or text. NumPy's parser raises
            other kinds too.
    """
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    header = _Header(*read(file))
    if header.dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if any(size < 0 for size in header.shape):
        raise ValueError(f"its shape is {header.shape}")
    return header


def _matrix_of(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path
) -> RowFile | NDArray[Any]:
    """Return the matrix of a ZIP file's member, on the disk where it is not compressed."""
    if member.compress_type != zipfile.ZIP_STORED:
        with archive.open(member) as stream:
            header = _header(stream)
            _refuse_matrix(header, path)
            return _array(header, stream, member.file_size, path)
    with path.open("rb") as file:
        file.seek(member.header_offset + LOCAL_HEADER - 4)
        lengths = np.frombuffer(file.read(4), "<u2")
        start = file.seek(int(lengths.sum()), SEEK_CUR)
        return _matrix(file, start + member.file_size, path)


def _matrix(file: IO[bytes], end: int, path: Path) -> RowFile | NDArray[Any]:
    """Return the matrix that the file stands at; in memory only if it lies by columns.

    Args:
        file: The file, at the array's header.
        end: Where in the file the array ends at the latest.
        path: The file's path.
    """
    header = _header(file)
    _refuse_matrix(header, path)
    if header.is_by_columns:
        return _array(header, file, end, path)
    _refuse_cut(header, file.tell(), end, path)
    return RowFile(path, file.tell(), header.dtype.str, (header.shape[0], header.shape[1]))


def _array_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    with archive.open(member) as stream:
        return _array(_header(stream), stream, member.file_size, path)


def _array(header: _Header, file: IO[bytes], end: int, path: Path) -> NDArray[Any]:
    """Return the array after a header, read into memory; see ``_matrix``."""
    _refuse_cut(header, file.tell(), end, path)
    values = np.frombuffer(file.read(header.num_bytes), header.dtype)
    if header.is_by_columns:
        return values.reshape(header.shape[::-1]).T
    return values.reshape(header.shape)


def _label_lists(positive: NDArray[Any], path: Path) -> LabelLists:
    if positive.dtype.kind not in "buif":
        raise PredictionsError(
            f"{path}: labels are of type {positive.dtype}, expected numbers.",
            hint="Save a matrix that is greater than 0 where a class is a label of a video.",
        )
    if positive.dtype.kind == "f" and np.isnan(positive).any():
        video, index = np.argwhere(np.isnan(positive))[0]
        raise PredictionsError(
            f"{path}: the label of class {index} in row {video} is not a number (NaN).",
            hint="Save a matrix that is greater than 0 where a class is a label of a video.",
        )
    videos, classes = np.nonzero(positive > 0)
    offsets = np.searchsorted(videos, np.arange(len(positive) + 1))
    return LabelLists(offsets.astype(np.int64), classes.astype(np.int64))


def _refuse_names(names: Sequence[str], path: Path) -> None:
    """Raise ``PredictionsError`` for an empty name, or one that two classes share."""
    first_of: dict[str, int] = {}
    for index, name in enumerate(names):
        first = first_of.setdefault(name, index)
        if not name.strip() or first < index:
            problem = f"is that of class {first} too" if name.strip() else "is empty"
            raise PredictionsError(
                f"{path}: the name of class {index} {problem}.",
                hint="Save another name for each class in label_names.",
            )


def _texts(array: NDArray[Any], name: str, path: Path) -> tuple[str, ...]:
    if array.dtype.kind not in "USiu":
        raise PredictionsError(
            f"{path}: {name} are of type {array.dtype}, expected text.",
            hint=f"Save {name} as an array of strings.",
        )
    texts = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array.astype(str)
    if (np.ascontiguousarray(texts).view(np.uint32) > sys.maxunicode).any():
        raise ValueError(f"{name} has a character that is not in Unicode")  # Python's str may crash
    return tuple(texts.tolist())


def _refuse_matrix(header: _Header, path: Path) -> None:
    if len(header.shape) != 2 or not header.shape[1] or header.dtype.name not in FLOATS:
        raise PredictionsError(
            f"{path}: the probabilities are {header.dtype} of shape {header.shape}, expected "
            "float16, float32 or float64 of shape (videos, classes).",
            hint="Save one row of probabilities for each video.",
        )


def _refuse_cut(header: _Header, start: int, end: int, path: Path) -> None:
    if header.num_bytes > end - start:
        raise PredictionsError(
            f"{path} is cut short: an array of shape {header.shape} takes "
            f"{counted(header.num_bytes, 'byte')}, and {max(end - start, 0):,} are there.",
            hint="Save the file again, or copy it again from where it is whole.",
        )


def _refuse_shape(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    of_matrix: tuple[int, ...],
) -> None:
    if shape != expected:
        raise PredictionsError(
            f"{path}: {name} have shape {shape}, expected {expected} for probabilities of shape "
            f"{of_matrix}.",
            hint="Save one row of probabilities for each video, one column for each class.",
        )
