"""How ONNX Runtime uses the numbers of an exported file, read from the profile of a run."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ensemble_kit.networks.loading import member_prefix
from ensemble_kit.serving.onnx_file import StoredTensor
from ensemble_kit.store.blocks import SCALE
from ensemble_kit.store.provenance import OnnxMetadata, SharesMetadata, has_blocks

BYTES = "UINT8"  # of matrices that have two numbers in each
PACKED = "MatMulNBits"  # what ONNX Runtime makes of a matrix in blocks and its product
CONVERSIONS = frozenset(
    {"BitShift", "BitwiseXor", "Cast", "Concat", "DequantizeLinear", "Gather", "Mul", "Reshape",
     "Slice", "Sub", "Transpose", "Unsqueeze"}
)  # fmt: skip


def counts_of(tensors: Iterable[StoredTensor], metadata: OnnxMetadata) -> dict[str, int]:
    """Return the number of values in each weight of a file, by the weight's name.

    Before operator set 21, a matrix of an odd number of values in ``int4`` counts as one more.

    Args:
        tensors: What the file stores, from ``read_tensors``.
        metadata: What it says of itself.
    """
    prefixes = tuple(member_prefix(member.name) for member in metadata.members)
    return {
        tensor.name: prod(tensor.shape) * (2 if tensor.type_name == BYTES else 1)
        for tensor in tensors
        if tensor.name.startswith(prefixes) and not tensor.name.endswith(SCALE)
    }


def shares_of_run(
    profile: Path, metadata: OnnxMetadata, counts: Mapping[str, int]
) -> SharesMetadata:
    """Return the shares from ONNX Runtime's profile of a session's runs.

    Args:
        profile: The file that the session wrote.
        metadata: What the exported file says of itself.
        counts: From ``counts_of``.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    kernels = {
        event["name"]: event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    total, plain = sum(counts.values()), _count_plain(metadata, counts)
    packed = sum(_matrix_size(args) for args in kernels.values() if args["op_name"] == PACKED)
    repeated = {
        name.rpartition("/")[0].removesuffix("/scale")
        for name, args in kernels.items()
        if args["op_name"] in CONVERSIONS
    }
    again = sum(count for name, count in counts.items() if name in repeated)
    return SharesMetadata(
        as_stored=packed + plain,
        converted_once=total - packed - plain - again,
        converted_in_every_run=again,
    )


def shares_of_types(metadata: OnnxMetadata, counts: Mapping[str, int]) -> SharesMetadata:
    """Return the shares of a file without blocks, as ``OnnxEnsemble`` opens it by default."""
    assert not has_blocks(metadata.members)
    plain = _count_plain(metadata, counts)
    converted = sum(counts.values()) - plain
    is_mapped = metadata.weights_file is not None
    return SharesMetadata(
        as_stored=plain,
        converted_once=0 if is_mapped else converted,
        converted_in_every_run=converted if is_mapped else 0,
    )


def _count_plain(metadata: OnnxMetadata, counts: Mapping[str, int]) -> int:
    """Return how many numbers are stored in float32, in which they are computed."""
    plain = tuple(member_prefix(each.name) for each in metadata.members if each.dtype == "fp32")
    return sum(count for name, count in counts.items() if name.startswith(plain))


def _matrix_size(args: Mapping[str, Any]) -> int:
    """Return inputs times outputs of a packed product, from the shapes in the event."""
    (left,) = args["input_type_shape"][0].values()
    (output,) = args["output_type_shape"][0].values()
    return int(left[-1]) * int(output[-1])
