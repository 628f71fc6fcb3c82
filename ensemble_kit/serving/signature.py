"""The inputs and outputs of an exported file, from its metadata."""

from typing import NamedTuple

from ensemble_kit.draws import draws_name
from ensemble_kit.store.provenance import OnnxMetadata


class Port(NamedTuple):
    """One input or output.

    Attributes:
        name: What the graph calls it.
        value_type: In NumPy's words: ``uint8``, ``float32`` or ``int64``.
        shape: Beside the batch, which comes first and is free; a word is free too.
        example: A number for each of ``shape``, to try the file with.
    """

    name: str
    value_type: str
    shape: tuple[int | str, ...]
    example: tuple[int, ...]


def inputs_of(metadata: OnnxMetadata) -> list[Port]:
    """Return the inputs of a file in the graph's order."""
    schema = metadata.data_schema
    length = schema.max_frames if schema.level == "frame" else 1
    ports = [
        Port(name, metadata.input_types[name], ("frames", width), (length, width))
        for name, width in schema.widths.items()
    ]
    ports.append(Port("num_frames", "int64", (), ()))
    if metadata.draw_source == "input":
        ports += [
            Port(
                draws_name(member),
                "float32",
                ("repeats" if metadata.repeats_are_free else metadata.repeats, count),
                (metadata.repeats, count),
            )
            for member, count in metadata.draws.items()
        ]
    return ports


def outputs_of(metadata: OnnxMetadata) -> list[Port]:
    """Return the outputs of a file in the graph's order."""
    count, k = metadata.data_schema.num_classes, metadata.top_k
    return [
        Port("probabilities", "float32", (count,), (count,)),
        Port("labels", "int64", (k,), (k,)),
        Port("confidences", "float32", (k,), (k,)),
    ]
