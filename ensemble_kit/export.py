"""Export: a fused file as one ONNX model that averages repeated random frame samples.

The graph is traced with weights that have shapes but no values (fake tensors) and gets the fused
file's own tensors afterwards, so the only copy in memory is the one that is written. Weights stay in
the fused type with a Cast to float32 behind each, because ONNX Runtime's CPU provider has no
bfloat16 arithmetic (microsoft/onnxruntime #28768).
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ensemble_kit
from ensemble_kit.checkpoints import FLOATING, TensorFile, open_tensors
from ensemble_kit.ensemble import FusedEnsemble, draws_name, example_frames
from ensemble_kit.errors import ExportError, SizeLimitError
from ensemble_kit.files import GIB, format_size, refuse_overwrite, sha256_of, written_aside
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.loading import load_fused, member_prefix
from ensemble_kit.provenance import FusedRecord
from ensemble_kit.recipes import parse_recipe
from ensemble_kit.runtime import METADATA_PREFIX, OnnxEnsemble
from ensemble_kit.submodel import SubModel

OPSET = 20
TOLERANCE = 1e-5  # float32 in another order of sums, over thousands of terms
WRAPPER = "ensemble."
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


class _Graph(nn.Module):
    """What is traced: the ensemble, and the top k of its probabilities."""

    def __init__(self, ensemble: FusedEnsemble, top_k: int) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.top_k = top_k

    def forward(self, frames: list[Tensor], num_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        named = dict(zip(self.ensemble.schema.widths, frames, strict=True))
        probabilities = self.ensemble(named, num_frames)
        confidences, labels = torch.topk(probabilities, self.top_k, dim=-1)
        return probabilities, labels, confidences


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
        with _quiet():
            model = _trace(record, repeats)
            _attach_weights(model, file, record, repeats)
            optimizer.optimize_ir(model, should_fold=_may_fold)
            _forget_traces(model)
        _describe(model, record, fused, repeats)
        with written_aside(output, force=force) as aside:
            ir.save(model, aside)
            num_bytes = aside.stat().st_size
            _refuse_size(num_bytes, max_size)
            _check_file(aside, record, output)
            worst = _prove(aside, file, record, repeats, output)
    return ExportedFile(output, num_bytes, max_size, repeats, worst)


def _trace(record: FusedRecord, repeats: int) -> ir.Model:
    schema = record.data_schema
    with FakeTensorMode():
        members = {m.name: SubModel(parse_recipe(m.recipe), schema) for m in record.members}
        ensemble = FusedEnsemble(
            members, [m.coefficient for m in record.members], schema, repeats=repeats
        )
        graph = _Graph(ensemble, top_k_of(record)).eval()
        frames = [
            torch.zeros(3, 7, m.width, dtype=getattr(torch, m.value_type))
            for m in schema.modalities
        ]
        num_frames = torch.zeros(3, dtype=torch.int64)
        batch, length = torch.export.Dim("batch"), torch.export.Dim("frames")
        with torch.no_grad():
            program = torch.onnx.export(
                graph,
                (frames, num_frames),
                dynamo=True,
                dynamic_shapes=([{0: batch, 1: length}] * len(frames), {0: batch}),
                input_names=[*schema.widths, "num_frames"],
                output_names=["probabilities", "labels", "confidences"],
                opset_version=OPSET,
                optimize=False,  # it would fold weights that are not there yet
                verbose=False,
            )
    assert program is not None
    return program.model  # type: ignore[return-value]


def top_k_of(record: FusedRecord) -> int:
    """Return how many classes the file lists for a video: the k of its GAP, at most all."""
    return min(record.top_k, record.data_schema.num_classes)


def _attach_weights(model: ir.Model, file: TensorFile, record: FusedRecord, repeats: int) -> None:
    """Give every initialiser its stored tensor, and a Cast to float32 where it needs one."""
    graph = model.graph
    tables = {
        WRAPPER + draws_name(member.name): draw_table(
            member.name, repeats=repeats, num_frames=parse_recipe(member.recipe).sampling.num_frames
        )
        for member in record.members
        if parse_recipe(member.recipe).sampling.name == "random"
    }
    for value in list(graph.initializers.values()):
        name = str(value.name)
        if name in tables:
            value.const_value = ir.tensor(tables[name].numpy(), name=name)
            continue
        if not name.startswith(WRAPPER):
            continue  # a constant of the tracer's, which has a value
        stored_name = name.removeprefix(WRAPPER)
        tensor = ir.tensor(file.tensor(stored_name), name=stored_name)
        if tensor.dtype == value.dtype:
            value.const_value = tensor
            continue
        del graph.initializers[name]
        stored = ir.Value(
            name=stored_name,
            shape=value.shape,
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(stored)
        cast = ir.node(
            "Cast",
            [stored],
            attributes={"to": ir.DataType.FLOAT},
            name=f"{stored_name}.cast",
        )
        value.replace_all_uses_with(cast.outputs[0])
        output = cast.outputs[0]
        output.name, output.shape, output.type = f"{stored_name}.fp32", value.shape, value.type
        graph.insert_before(graph[0], cast)


def _may_fold(node: ir.Node) -> bool | None:
    """Keep the Cast of a stored weight: folding it would double the file."""
    is_weight = node.op_type == "Cast" and any(
        value is not None and value.is_initializer() for value in node.inputs
    )
    return False if is_weight else None


def _forget_traces(model: ir.Model) -> None:
    """Drop the exporter's notes: source lines and paths of this machine, a kilobyte a node."""
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()


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
        "validation_gap": json.dumps(record.validation_gap),
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
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"{output} fails onnx's checker: {error}.",
            mend="Report this as a fault of ensemble-kit; nothing was written.",
        ) from error
    graph = onnx.load(path).graph
    wanted = onnx.TensorProto.DataType.Value(ONNX_TYPES[record.dtype])
    prefixes = tuple(member_prefix(member.name) for member in record.members)
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    for tensor in graph.initializer:
        is_weight = tensor.name.removeprefix(WRAPPER).startswith(prefixes)
        if is_weight and tensor.data_type in floating and tensor.data_type != wanted:
            found = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise ExportError(
                f"{output}: {tensor.name} is stored as {found}, not {ONNX_TYPES[record.dtype]}.",
                mend="Report this as a fault of ensemble-kit; nothing was written.",
            )


def _prove(
    path: Path, file: TensorFile, record: FusedRecord, repeats: int, output: Path
) -> float:
    """Compare ONNX Runtime with PyTorch on several batch sizes and lengths, one frame among them."""
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to its own developers from the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
