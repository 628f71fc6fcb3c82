"""How ONNX Runtime uses the numbers of an exported file, read from the profile of a run."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ensemble_kit.networks.loading import member_prefix
from ensemble_kit.serving.onnx_file import read_tensors
from ensemble_kit.store.blocks import FORMATS, SCALE
from ensemble_kit.store.provenance import OnnxMetadata, SharesMetadata

PACKED = "MatMulNBits"  # what ONNX Runtime makes of a matrix in blocks and its product
CONVERSIONS = frozenset({"Cast", "DequantizeLinear", "Gather", "Mul", "Transpose", "Unsqueeze"})


def counts_of(path: Path, metadata: OnnxMetadata) -> dict[str, int]:
    """Return the number of values in each weight of a file, by the weight's name."""
    prefixes = tuple(member_prefix(member.name) for member in metadata.members)
    return {
        tensor.name: prod(tensor.shape)
        for tensor in read_tensors(path)
        if tensor.name.startswith(prefixes) and not tensor.name.endswith(SCALE)
    }


def shares_of_run(profile: Path, counts: Mapping[str, int]) -> SharesMetadata:
    """Return the shares from ONNX Runtime's profile of a session's runs.

    Args:
        profile: The file that the session wrote.
        counts: From ``counts_of``.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    kernels = {
        event["name"]: event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    total = sum(counts.values())
    packed = sum(_matrix_size(args) for args in kernels.values() if args["op_name"] == PACKED)
    repeated = {
        name.rpartition("/")[0].removesuffix("/scale")
        for name, args in kernels.items()
        if args["op_name"] in CONVERSIONS
    }
    again = sum(count for name, count in counts.items() if name in repeated)
    return SharesMetadata(
        as_stored=packed,
        converted_once=total - packed - again,
        converted_in_every_run=again,
    )


def shares_of_types(metadata: OnnxMetadata, counts: Iterable[int]) -> SharesMetadata:
    """Return the shares of a file without blocks, as ``OnnxEnsemble`` opens it by default."""
    assert metadata.dtype not in FORMATS
    total = sum(counts)
    is_converted = metadata.dtype != "fp32"
    is_mapped = metadata.weights_file is not None
    return SharesMetadata(
        as_stored=0 if is_converted else total,
        converted_once=total if is_converted and not is_mapped else 0,
        converted_in_every_run=total if is_converted and is_mapped else 0,
    )


def _matrix_size(args: Mapping[str, Any]) -> int:
    """Return inputs times outputs of a packed product, from the shapes in the event."""
    (left,) = args["input_type_shape"][0].values()
    (output,) = args["output_type_shape"][0].values()
    return int(left[-1]) * int(output[-1])
