"""Export: a fused file as one ONNX model that averages repeated random frame samples."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

import ensemble_kit
from ensemble_kit.checkpoints import TensorFile, open_tensors
from ensemble_kit.ensemble import example_frames
from ensemble_kit.errors import ExportError, SizeLimitError
from ensemble_kit.files import GIB, format_size, refuse_overwrite, sha256_of, written_aside
from ensemble_kit.loading import load_fused, member_prefix
from ensemble_kit.onnx_graph import build_graph, top_k_of
from ensemble_kit.provenance import FusedRecord
from ensemble_kit.runtime import METADATA_PREFIX, OnnxEnsemble

TOLERANCE = 1e-5  # float32 in another order of sums, over thousands of terms
ONNX_TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


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
    file, different for each member; the others run once.

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
    with open_tensors(fused) as file:
        record = file.record(FusedRecord)
        model = build_graph(file, record, repeats=repeats)
        _describe(model, record, fused, repeats)
        with written_aside(output, force=force) as aside:
            ir.save(model, aside)
            num_bytes = aside.stat().st_size
            _refuse_size(num_bytes, max_size)
            _check_file(aside, record, output)
            worst = _prove(aside, file, record, repeats, output)
    return ExportedFile(output, num_bytes, max_size, repeats, worst)


def _describe(model: ir.Model, record: FusedRecord, fused: Path, repeats: int) -> None:
    """Write into the file what it is and where it comes from."""
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
    model.metadata_props.update({METADATA_PREFIX + key: text for key, text in about.items()})
    model.producer_name, model.producer_version = "ensemble-kit", ensemble_kit.__version__
    model.graph.name = "ensemble"


def _refuse_size(num_bytes: int, max_size: int) -> None:
    if num_bytes > max_size:
        excess = num_bytes - max_size
        raise SizeLimitError(
            f"The ONNX file has {num_bytes:,} bytes ({format_size(num_bytes)}), {excess:,} bytes "
            f"({format_size(excess)}) over the limit of {format_size(max_size)}.",
            mend="Select and fuse again with a smaller --max-size, or raise --max-size here.",
        )


def _check_file(path: Path, record: FusedRecord, output: Path) -> None:
    """Run onnx's checker and look at the type of every stored weight."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{output} fails onnx's checker: {error}.",
            mend="Report this as a fault of ensemble-kit; nothing was written.",
        ) from error
    graph = onnx.load(path).graph
    wanted = onnx.TensorProto.DataType.Value(ONNX_TYPES[record.dtype])
    prefixes = tuple(member_prefix(member.name) for member in record.members)
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    for tensor in graph.initializer:
        is_weight = tensor.name.startswith(prefixes)
        if is_weight and tensor.data_type in floating and tensor.data_type != wanted:
            found = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise ExportError(
                f"{output}: {tensor.name} is stored as {found}, not {ONNX_TYPES[record.dtype]}.",
                mend="Report this as a fault of ensemble-kit; nothing was written.",
            )


def _prove(path: Path, file: TensorFile, record: FusedRecord, repeats: int, output: Path) -> float:
    """Compare ONNX Runtime with PyTorch on several batch sizes and lengths, 1 frame among them."""
    session = OnnxEnsemble(path)
    ensemble = load_fused(file, repeats=repeats)
    worst = 0.0
    for batch_size, length in ((1, 1), (3, 7), (2, 11)):
        frames, num_frames = example_frames(record.data_schema, batch_size, length)
        with torch.inference_mode():
            expected = ensemble(frames, num_frames).numpy()
        found = session.run({k: v.numpy() for k, v in frames.items()}, num_frames.numpy())
        difference = float(np.abs(expected - found.probabilities).max())
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{output}: ONNX Runtime's probabilities differ by {difference:.2g} from "
                f"PyTorch's on {batch_size} videos of {length} frames; at most {TOLERANCE:.0e} "
                "may be.",
                mend="Report this as a fault of ensemble-kit; nothing was written.",
            )
        worst = max(worst, difference)
    return worst
