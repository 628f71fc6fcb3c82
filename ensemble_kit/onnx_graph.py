"""A fused file's graph in ONNX. Imports ``ensemble``, ``loading`` and below.

The graph is traced with weights that have shapes but no values (fake tensors) and gets the fused
file's own tensors afterwards, so the only copy in memory is the one that is written. Weights stay
in the fused type with a Cast to float32 behind each, because ONNX Runtime's CPU provider has no
bfloat16 arithmetic (microsoft/onnxruntime #28768).
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ensemble_kit.checkpoints import TensorFile
from ensemble_kit.ensemble import FusedEnsemble, draws_name
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.provenance import FusedRecord
from ensemble_kit.recipes import parse_recipe
from ensemble_kit.submodel import SubModel

OPSET = 20
WRAPPER = "ensemble."  # what the tracer puts before the names of the ensemble's tensors


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


def build_graph(file: TensorFile, record: FusedRecord, *, repeats: int) -> ir.Model:
    """Return the ONNX model of an open fused file.

    Inputs are the schema's modalities, ``(B, T, D)``, and ``num_frames`` ``(B,)`` int64; outputs
    ``probabilities`` ``(B, C)`` and the k best ``labels`` and ``confidences`` ``(B, k)``.

    Args:
        file: The fused file; the model's tensors are read from it.
        record: The file's metadata.
        repeats: R, draws whose probabilities are averaged.
    """
    with _quiet():
        model, draws = _trace(record, repeats)
        tables = {
            draws_name(name): draw_table(name, repeats=repeats, num_frames=num_frames)
            for name, num_frames in draws.items()
        }
        _attach_weights(model, file, tables)
        optimizer.optimize_ir(model, should_fold=_may_fold)
        _forget_traces(model)
    return model


def top_k_of(record: FusedRecord) -> int:
    """Return how many classes the file lists for a video: the k of its GAP, at most all."""
    return min(record.top_k, record.data_schema.num_classes)


def _trace(record: FusedRecord, repeats: int) -> tuple[ir.Model, dict[str, int]]:
    """Return the graph without weights, and how many frames each random member draws."""
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
    draws = {name: member.num_draws for name, member in members.items()}
    return program.model, {name: count for name, count in draws.items() if count is not None}


def _attach_weights(model: ir.Model, file: TensorFile, tables: Mapping[str, Tensor]) -> None:
    """Give every initialiser its stored tensor, and a Cast to float32 where it needs one."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = str(value.name)
        if not name.startswith(WRAPPER):
            continue  # a constant of the tracer's, which has a value
        stored_name = name.removeprefix(WRAPPER)
        if stored_name in tables:
            value.const_value = ir.tensor(tables[stored_name].numpy(), name=name)
            continue
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
