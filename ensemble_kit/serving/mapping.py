"""One ONNX file opened without reading its weights: ONNX Runtime maps them from where they lie.

Opened by its name, a file is parsed as one protobuf message: all weights are in memory before the
first is used, and are copied once more out of it. Weights in a second file are mapped in place of
that. A model may name any file as the second, so its own will do.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from ensemble_kit.serving.onnx_file import (
    DATA_LOCATION,
    EXTERNAL_DATA,
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    MODEL_PROPERTY,
    RAW_DATA,
    opened,
)
from ensemble_kit.serving.protobuf import (
    Place,
    head_of,
    number_field,
    pair_field,
    read_bytes,
    read_pair,
    whole_fields,
)

Replace: TypeAlias = Callable[[BinaryIO, Place], bytes]  # returns another content of a field
MIN_BYTES = 4096  # a page; smaller tensors are not worth mapping
FOLDER = "session.model_external_initializers_file_folder_path"  # where such a model's files lie


class MappedModel(NamedTuple):
    """A model whose large weights stay in its file.

    Attributes:
        content: The model with references to the file in place of them. A session reads it with
            ``FOLDER`` set to the file's folder.
        properties: The model's properties.
    """

    content: bytes
    properties: dict[str, str]


def mapped_model(path: Path) -> MappedModel:
    """Return a file's model with references to its own bytes in place of large weights.

    Raises:
        ExportError: The file is not a whole ONNX file.
    """
    with opened(path) as (file, size):
        mapped_tensor = partial(_mapped_tensor, location=path.name)
        mapped_graph = partial(_replaced, replace={GRAPH_INITIALIZER: mapped_tensor})
        properties: dict[str, str] = {}

        def kept_property(file: BinaryIO, place: Place) -> bytes:
            properties.update([read_pair(file, place)])
            return read_bytes(file, place)

        replace: dict[int, Replace] = {MODEL_GRAPH: mapped_graph, MODEL_PROPERTY: kept_property}
        return MappedModel(_replaced(file, (0, size), replace=replace), properties)


def _replaced(file: BinaryIO, message: Place, *, replace: Mapping[int, Replace]) -> bytes:
    """Return a message with another content in its fields of some numbers."""
    parts = []
    for field, value, place in whole_fields(file, message):
        if field in replace and isinstance(value, tuple):
            content = replace[field](file, value)
            parts.append(head_of(field, len(content)) + content)
        else:
            parts.append(read_bytes(file, place))
    return b"".join(parts)


def _mapped_tensor(file: BinaryIO, tensor: Place, location: str) -> bytes:
    parts = []
    for field, value, place in whole_fields(file, tensor):
        if field == RAW_DATA and isinstance(value, tuple) and value[1] - value[0] >= MIN_BYTES:
            entries = {"location": location, "offset": value[0], "length": value[1] - value[0]}
            parts += [pair_field(EXTERNAL_DATA, key, str(entries[key])) for key in entries]
            parts.append(number_field(DATA_LOCATION, 1))
        else:
            parts.append(read_bytes(file, place))
    return b"".join(parts)
