"""One ONNX file opened without reading its weights: ONNX Runtime maps them from where they lie.

Opened by its name, a file is parsed as one protobuf message: all weights are in memory before the
first is used, and are copied once more out of it. Weights in a second file are mapped in place of
that. A model may name any file as the second, so its own will do.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ensemble_kit.serving.onnx_file import (
    DATA_LOCATION,
    EXTERNAL_DATA,
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    RAW_DATA,
    opened,
)
from ensemble_kit.serving.protobuf import (
    Place,
    head_of,
    number_field,
    pair_field,
    read_bytes,
    whole_fields,
)

MIN_BYTES = 4096  # a page; smaller tensors are not worth mapping
FOLDER = "session.model_external_initializers_file_folder_path"  # where such a model's files lie


def mapped_model(path: Path) -> bytes:
    """Return a file's model with references to its own bytes in place of large weights.

    A session reads it with ``FOLDER`` set to the file's folder.

    Raises:
        ExportError: The file is not a whole ONNX file.
    """
    with opened(path) as (file, size):
        mapped_tensor = partial(_mapped_tensor, location=path.name)
        mapped_graph = partial(_replaced, wanted=GRAPH_INITIALIZER, replace=mapped_tensor)
        return _replaced(file, (0, size), wanted=MODEL_GRAPH, replace=mapped_graph)


def _replaced(
    file: BinaryIO, message: Place, *, wanted: int, replace: Callable[[BinaryIO, Place], bytes]
) -> bytes:
    """Return a message with another content in each of its fields of one number."""
    parts = []
    for field, value, place in whole_fields(file, message):
        if field == wanted and isinstance(value, tuple):
            content = replace(file, value)
            parts.append(head_of(wanted, len(content)) + content)
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
