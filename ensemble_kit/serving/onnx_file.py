"""ONNX files written and read one tensor at a time.

An ONNX file is one protobuf message: a ModelProto with one GraphProto, whose initialisers are
TensorProtos that hold the weights. The obvious way to write it, ``onnx.save``, holds the whole
message in memory and its serialised bytes beside it: a file of 1 GiB needs over 2 GiB, and
``onnx.load`` of it as much again. Weights in a second file (``save_as_external_data``) would need
less, but the point of this kit is one file.

So the outer fields are written and read here in protobuf's wire format, and each weight passes
through memory once, between fields that are known beforehand. That is possible because a length
stands before each message, and the length of a tensor follows from its type and shape. Field
numbers are those of ``onnx.proto``. Readers of ONNX see an ordinary model.

The last field of a file is a property with the SHA-256 of all bytes before it, so that a damaged
file can be recognised without another file to compare it with. Protobuf allows fields in any order,
so the property may come last.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from os.path import isfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.errors import ExportError
from ensemble_kit.serving.protobuf import (
    DamagedError,
    Place,
    fields,
    head_of,
    number_field,
    pair_field,
    read_pair,
    read_text,
    read_varints,
    text_field,
)
from ensemble_kit.store.dtypes import BY_ONNX

MODEL_GRAPH, MODEL_PROPERTY, GRAPH_INITIALIZER = 7, 14, 5
DIMS, DATA_TYPE, NAME, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 8, 9, 13, 14
CONTENT_SHA256 = "ensemble_kit.content_sha256"
PAGE = 4096  # tensors in a separate file begin at multiples of this, so that they can be mapped
CHUNK = 2**22


class Weight(NamedTuple):
    """A tensor that is to be written.

    Attributes:
        name: Of the initialiser.
        data_type: Its type, as ``TensorProto.DataType`` numbers them.
        shape: Its dimensions.
        read: Returns its values as bytes, little-endian.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.uint8]]

    @property
    def num_bytes(self) -> int:
        """What its values take."""
        return BY_ONNX[self.data_type].bytes_of(prod(self.shape))


class StoredTensor(NamedTuple):
    """A tensor that a file holds.

    Attributes:
        name: Of the initialiser.
        type_name: ``FLOAT``, ``BFLOAT16``, …
        shape: Its dimensions.
        num_bytes: What its values take.
        location: The file beside that holds the values; None for the file itself.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    num_bytes: int
    location: str | None


# Writing


def write_onnx(
    path: Path,
    model: bytes,
    graph: bytes,
    weights: Sequence[Weight],
    properties: Mapping[str, str],
    *,
    references: Sequence[bytes] | None = None,
) -> "hashlib._Hash":
    """Write a model; each weight is read when its turn has come.

    Args:
        path: The file to write.
        model: A serialised ModelProto without its graph.
        graph: A serialised GraphProto without these weights.
        weights: Initialisers to add to the graph.
        properties: Metadata to add to the model.
        references: From ``write_beside``, where another file holds the values.

    Returns:
        The hash of all but the last field, for ``add_properties``.
    """
    heads = []
    for index, weight in enumerate(weights):
        head = b"".join(number_field(DIMS, size) for size in weight.shape)
        head += number_field(DATA_TYPE, weight.data_type) + text_field(NAME, weight.name)
        held = weight.num_bytes if references is None else 0
        head += head_of(RAW_DATA, held) if references is None else references[index]
        heads.append(head_of(GRAPH_INITIALIZER, len(head) + held) + head)
    outside = references is not None
    size = len(graph) + sum(map(len, heads))
    size += 0 if outside else sum(weight.num_bytes for weight in weights)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        write(model + head_of(MODEL_GRAPH, size) + graph)
        for head, weight in zip(heads, weights, strict=True):
            write(head)
            if not outside:
                _copy(weight, write)
        write(b"".join(_property(key, text) for key, text in properties.items()))
        file.write(_property(CONTENT_SHA256, digest.hexdigest()))
    return digest


def add_properties(path: Path, properties: Mapping[str, str], digest: "hashlib._Hash") -> None:
    """Add metadata to a model that ``write_onnx`` has written, and nothing has changed since.

    Args:
        path: The file.
        properties: Metadata under keys that the model does not have yet.
        digest: What ``write_onnx`` returned.
    """
    added = b"".join(_property(key, text) for key, text in properties.items())
    with path.open("r+b") as file:
        file.seek(-len(_property(CONTENT_SHA256, digest.hexdigest())), os.SEEK_END)
        digest.update(added)
        file.write(added + _property(CONTENT_SHA256, digest.hexdigest()))


def copy_with_property(
    path: Path, aside: Path, key: str, text: str, before: Mapping[str, str]
) -> None:
    """Write a model again with one more property, which replaces an earlier one of that key.

    Args:
        path: A file that the kit wrote.
        aside: The file to write.
        key: Of the property; no other property was added after it.
        text: Its value.
        before: What ``read_properties`` returned.

    Raises:
        ExportError: The file is no whole ONNX file, or its bytes are not those that were written.
    """
    last = _property(CONTENT_SHA256, before.get(CONTENT_SHA256, ""))
    old = _property(key, before[key]) if key in before else b""
    left = path.stat().st_size - len(last) - len(old)
    digest = hashlib.sha256()
    with path.open("rb") as file, aside.open("wb") as copy:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            copy.write(chunk)
            left -= len(chunk)
        whole = digest.copy()
        whole.update(old)
        if file.read() != old + last or whole.hexdigest() != before.get(CONTENT_SHA256):
            raise ExportError(
                f"{path} does not have the bytes that were written.",
                hint="Export the file again, or copy it again from where it is whole.",
            )
        added = _property(key, text)
        digest.update(added)
        copy.write(added + _property(CONTENT_SHA256, digest.hexdigest()))


def write_beside(path: Path, weights: Sequence[Weight], *, location: str) -> list[bytes]:
    """Write values into a separate file, for ONNX Runtime to map into memory.

    Args:
        path: The file to write.
        weights: Read one after the other.
        location: What the file will be called in the folder of the model.

    Returns:
        What ``write_onnx`` writes in the values' place.
    """
    references = []
    with path.open("wb") as file:
        for weight in weights:
            file.write(b"\0" * (-file.tell() % PAGE))
            place = {"location": location, "offset": file.tell(), "length": weight.num_bytes}
            entries = (pair_field(EXTERNAL_DATA, key, str(value)) for key, value in place.items())
            references.append(b"".join(entries) + number_field(DATA_LOCATION, 1))
            _copy(weight, file.write)
    return references


def _copy(weight: Weight, write: Callable[[memoryview], object]) -> None:
    values = weight.read()
    if values.nbytes != weight.num_bytes:
        raise ExportError(
            f"{weight.name} has {values.nbytes:,} bytes where its type and shape take "
            f"{weight.num_bytes:,}.",
            hint="Copy the file that it is read from again from where it is whole.",
        )
    for start in range(0, values.nbytes, CHUNK):
        write(values[start : start + CHUNK].data)


def _property(key: str, value: str) -> bytes:
    return pair_field(MODEL_PROPERTY, key, value)


# Reading


def read_tensors(path: Path) -> list[StoredTensor]:
    """Return what a file stores, without its values.

    Raises:
        ExportError: The file is not a whole ONNX file, or says that values lie outside of its
            folder or beyond the end of the file that holds them.
    """
    with opened(path) as (file, size):
        return [
            _stored(path, file, tensor)
            for field, graph in fields(file, (0, size))
            if field == MODEL_GRAPH and isinstance(graph, tuple)
            for inner, tensor in fields(file, graph)
            if inner == GRAPH_INITIALIZER and isinstance(tensor, tuple)
        ]


def needed_files(path: Path, tensors: Iterable[StoredTensor]) -> list[Path]:
    """Return the files that are needed to run a model: its own, then those that hold values.

    Args:
        path: The model.
        tensors: What ``read_tensors`` returned.
    """
    locations = {tensor.location: None for tensor in tensors}
    return [path, *(values_path(path, name) for name in locations if name is not None)]


def values_path(path: Path, name: str) -> Path:
    """Return the file of values that a model names.

    It lies beside the model. If the model is a link, it may also lie beside what that links to, as
    ONNX Runtime looks for it.
    """
    beside = path.parent / name
    return beside if isfile(beside) else Path(os.path.realpath(path)).parent / name


def read_properties(path: Path) -> dict[str, str]:
    """Return a model's properties.

    Raises:
        ExportError: The file is not a whole ONNX file.
    """
    with opened(path) as (file, size):
        return dict(
            read_pair(file, place)
            for field, place in fields(file, (0, size))
            if field == MODEL_PROPERTY and isinstance(place, tuple)
        )


def is_whole(path: Path, properties: Mapping[str, str]) -> bool:
    """Return whether a file has the bytes that were written.

    Args:
        path: The file.
        properties: What ``read_properties`` returned.
    """
    claimed = properties.get(CONTENT_SHA256, "")
    last = _property(CONTENT_SHA256, claimed)
    left = path.stat().st_size - len(last)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        return file.read() == last and digest.hexdigest() == claimed


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file to read fields from; what goes wrong is an error of the export."""
    try:
        with path.open("rb") as file:
            yield file, path.stat().st_size
    except OSError as error:
        raise ExportError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error
    except (UnicodeDecodeError, DamagedError) as error:
        raise ExportError(
            f"{path} is not a whole ONNX file: its fields do not add up.",
            hint="Export the file again, or copy it again from where it is whole.",
        ) from error


def _stored(path: Path, file: BinaryIO, place: Place) -> StoredTensor:
    shape: list[int] = []
    name, type_name, known, held = "", "UNDEFINED", None, None
    outside: dict[str, str] = {}
    for field, value in fields(file, place):
        if isinstance(value, int):
            if field == DIMS:
                shape.append(value)
            elif field == DATA_TYPE:
                known = BY_ONNX.get(value)
                type_name = known.onnx if known else f"type {value}"
        elif field == DIMS:  # one field of all, as other tools write them
            shape += read_varints(file, value)
        elif field == NAME:
            name = read_text(file, value)
        elif field == EXTERNAL_DATA:
            key, text = read_pair(file, value)
            outside[key] = text
        elif field == RAW_DATA:
            held = value[1] - value[0]
    num_bytes = known.bytes_of(prod(shape)) if known else 0
    if outside:
        _require_beside(path, name, outside, num_bytes)
    elif held is not None and known and held != num_bytes:
        raise DamagedError
    return StoredTensor(name, type_name, tuple(shape), num_bytes, outside.get("location"))


def _require_beside(path: Path, name: str, outside: Mapping[str, str], num_bytes: int) -> None:
    """Raise unless a tensor's values lie in a file of the model's own folder, all of them."""
    location = outside.get("location", "")
    other = values_path(path, location)
    numbers = [outside.get(key, "0") for key in ("offset", "length")]
    if not location or Path(location).name != location:
        problem = f"in {location!r}, outside of its folder"
    elif not isfile(other):
        problem = f"in {location}, which does not exist"
    elif not all(number.isdecimal() for number in numbers) or (
        int(numbers[0]) + max(int(numbers[1]), num_bytes) > other.stat().st_size
    ):
        problem = f"beyond the end of {location}"
    else:
        return
    raise ExportError(
        f"{path} says that the values of {name} lie {problem}.",
        hint="Copy both files again from where they are whole, into one folder.",
    )
