"""Export: a fused file as one ONNX model that averages repeated random frame samples."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

import ensemble_kit
from ensemble_kit.checkpoints import TensorFile, open_tensors
from ensemble_kit.ensemble import example_frames
from ensemble_kit.errors import ExportError, SizeLimitError
from ensemble_kit.files import GIB, format_size, refuse_overwrite, sha256_of, written_aside
from ensemble_kit.loading import load_fused_member, member_prefix
from ensemble_kit.onnx_file import read_tensors, write_onnx
from ensemble_kit.onnx_graph import OUTPUTS, Graph, build_graph, top_k_of
from ensemble_kit.provenance import Dtype, FusedRecord
from ensemble_kit.runtime import METADATA_PREFIX, PROVIDERS
from ensemble_kit.storage import SCALE

TOLERANCE = 1e-5  # float32 in another order of sums, over thousands of terms
LARGEST_FILE = 2**31 - 1  # protobuf's limit of a message
STORED_TYPES: dict[Dtype, tuple[str, ...]] = {
    "fp32": ("FLOAT",),
    "fp16": ("FLOAT16",),
    "bf16": ("BFLOAT16",),
    "int8": ("INT8", "BFLOAT16"),
}
REPORT_IT = "Report this as a fault of ensemble-kit; nothing was written."
SIZES = ((1, 1), (3, 7), (2, 11))  # videos and frames of the batches that are compared
Batches = list[tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file that has passed its proofs.

    Attributes:
        path: Where it lies.
        num_bytes: Its size; there are no other files.
        max_size: The limit it fits.
        repeats: Draws that it averages.
        worst_difference: The largest difference of any probability from PyTorch's.
    """

    path: Path
    num_bytes: int
    max_size: int
    repeats: int
    worst_difference: float


def export_onnx(
    fused: Path,
    output: Path,
    *,
    repeats: int = 10,
    max_size: int = GIB,
    force: bool = False,
) -> ExportedFile:
    """Write a fused file as one ONNX model, and prove it equal before it is kept.

    Inputs are ``(B, T, D)`` for each modality, uint8 where records hold bytes and float32
    otherwise, and ``num_frames`` ``(B,)`` int64; B and T are free. Outputs are ``probabilities``
    ``(B, C)``, and ``labels`` and ``confidences`` ``(B, k)``, the k most probable classes. Members
    that sample at random do so ``repeats`` times, with a table of uniform numbers stored in the
    file, different for each member; the others run once. Weights pass through memory one at a time,
    and one member at a time is run in PyTorch.

    Args:
        fused: A fused file.
        output: The file to write.
        repeats: R, draws whose probabilities are averaged.
        max_size: The most bytes the file may have.
        force: Whether an existing file may be replaced.

    Raises:
        CheckpointError: ``fused`` is missing, damaged or of another kind.
        SizeLimitError: The file is larger than ``max_size``.
        ExportError: The file fails onnx's checker, stores a weight in another type, or differs
            from PyTorch.
        OutputError: ``output`` exists and ``force`` is False.
    """
    refuse_overwrite(output, force=force)
    with open_tensors(fused) as file, written_aside(output, force=force) as aside:
        record = file.record(FusedRecord)
        graph = build_graph(file, record, repeats=repeats)
        _check_graph(graph, output)
        write_onnx(aside, *graph.parts(), graph.weights, _describe(record, fused, repeats))
        num_bytes = aside.stat().st_size
        _refuse_size(num_bytes, max_size, output)
        _check_weights(aside, record, output)
        batches = [example_frames(record.data_schema, *size) for size in SIZES]
        worst = _prove(aside, batches, _expected(file, record, repeats, batches), output)
    return ExportedFile(output, num_bytes, max_size, repeats, worst)


def _describe(record: FusedRecord, fused: Path, repeats: int) -> dict[str, str]:
    """Return what the file says of itself and where it comes from."""
    about = {
        "kit_version": ensemble_kit.__version__,
        "data_schema": record.data_schema.model_dump_json(),
        "label_names": json.dumps(record.data_schema.names),
        "members": json.dumps([member.model_dump() for member in record.members]),
        "dtype": record.dtype,
        "repeats": str(repeats),
        "top_k": str(top_k_of(record)),
        "fused_sha256": sha256_of(fused),
        "validation": record.validation.model_dump_json() if record.validation else "null",
    }
    return {METADATA_PREFIX + key: text for key, text in about.items()}


def _refuse_size(num_bytes: int, max_size: int, output: Path) -> None:
    if num_bytes > max_size:
        excess = num_bytes - max_size
        raise SizeLimitError(
            f"The ONNX file has {num_bytes:,} bytes ({format_size(num_bytes)}), {excess:,} bytes "
            f"({format_size(excess)}) over the limit of {format_size(max_size)}.",
            mend="Select and fuse again with a smaller --max-size, or raise --max-size here.",
        )
    if num_bytes > LARGEST_FILE:
        raise ExportError(
            f"{output} would have {num_bytes:,} bytes; ONNX Runtime reads at most "
            f"{LARGEST_FILE:,} from one file.",
            mend="Fuse again with --dtype bf16 or --dtype int8.",
        )


def _check_graph(graph: Graph, output: Path) -> None:
    """Run onnx's checker on the graph; what it checks of weights is their types and shapes."""
    try:
        onnx.checker.check_model(graph.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{output} fails onnx's checker: {error}.",
            mend=REPORT_IT,
        ) from error


def _check_weights(path: Path, record: FusedRecord, output: Path) -> None:
    """Look at the type of every stored weight: a Cast computed too early would double the file."""
    prefixes = tuple(member_prefix(member.name) for member in record.members)
    for tensor in read_tensors(path):
        wanted = ("FLOAT",) if tensor.name.endswith(SCALE) else STORED_TYPES[record.dtype]
        if tensor.name.startswith(prefixes) and tensor.type_name not in wanted:
            raise ExportError(
                f"{output}: {tensor.name} is stored as {tensor.type_name}, not "
                f"{' or '.join(wanted)}.",
                mend=REPORT_IT,
            )


def _expected(
    file: TensorFile, record: FusedRecord, repeats: int, batches: Batches
) -> list[Tensor]:
    """Return PyTorch's probabilities for each batch; one member at a time is in memory."""
    mixed = [torch.zeros(()) for _ in batches]
    with torch.inference_mode():
        for member in record.members:
            model = load_fused_member(file, member, record.data_schema)
            draws = model.draws_for(member.name, repeats=repeats)
            for index, (frames, num_frames) in enumerate(batches):
                mixed[index] = mixed[index] + member.coefficient * model(frames, num_frames, draws)
    return mixed


def _prove(path: Path, batches: Batches, expected: list[Tensor], output: Path) -> float:
    """Run the file on several batch sizes and lengths; return the largest difference found."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            path,
            options,
            providers=[PROVIDERS["cpu"]],
            disabled_optimizers=["ConstantFolding"],  # no float32 copy of every weight
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise ExportError(
            f"{output}: ONNX Runtime cannot open it: {str(error).rstrip('.')}.", mend=REPORT_IT
        ) from error
    worst = 0.0
    for (frames, num_frames), probabilities in zip(batches, expected, strict=True):
        feed = {name: values.numpy() for name, values in frames.items()}
        feed["num_frames"] = num_frames.numpy()
        (found,) = session.run([OUTPUTS[0]], feed)
        difference = float(np.abs(probabilities.numpy() - found).max())
        if not difference <= TOLERANCE:
            videos, length = next(iter(frames.values())).shape[:2]
            raise ExportError(
                f"{output}: ONNX Runtime's probabilities differ by {difference:.2g} from "
                f"PyTorch's on {videos} videos of {length} frames; at most {TOLERANCE:.0e} may be.",
                mend=REPORT_IT,
            )
        worst = max(worst, difference)
    return worst
