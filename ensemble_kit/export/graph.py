"""The ONNX graph of a fused file.

The graph is traced with weights that have shapes but no values (fake tensors). The numbers of the
fused file are read while the ONNX file is written, one tensor at a time.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer, version_converter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ensemble_kit._version import __version__
from ensemble_kit.choices import BLOCK_OPSET, DRAW_SOURCE, OPSET, DrawSource, InputType, Opset
from ensemble_kit.draws import draws_name
from ensemble_kit.errors import ExportError
from ensemble_kit.export.blocks import place_blocks
from ensemble_kit.export.guards import refuse_empty_inputs
from ensemble_kit.export.inlining import inline_foreign
from ensemble_kit.export.node_names import name_nodes
from ensemble_kit.export.weights import attach_weights
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.layers.recurrent import Cell, Recurrence
from ensemble_kit.networks.ensemble import FusedEnsemble, module_name
from ensemble_kit.networks.foreign import DOMAIN, WEIGHTS, ForeignModel, opset_of
from ensemble_kit.networks.loading import empty_member, member_prefix
from ensemble_kit.serving.onnx_file import Weight
from ensemble_kit.serving.session import OUTPUTS
from ensemble_kit.store.provenance import FusedMetadata, has_blocks
from ensemble_kit.store.tensor_files import TensorFile

PREFIX = "ensemble."  # prefix that the tracer gives the weights' names
IR_VERSION = 9  # of files, in the release of ONNX that brought ``OPSET``
FLOAT = onnx.TensorProto.FLOAT


class Graph(NamedTuple):
    """An ONNX graph whose weights are still in the fused file.

    Attributes:
        model: The model; its weights are inputs of the graph, so that it can be checked.
        weights: The weights to write in place of these inputs.
        draws: Uniform numbers in one draw of each member that samples at random.
        repeats_are_free: Whether it accepts any number of draws.
        opset: The version of ONNX's operators that it is written in.
    """

    model: onnx.ModelProto
    weights: list[Weight]
    draws: dict[str, int]
    repeats_are_free: bool
    opset: int

    def parts(self) -> tuple[bytes, bytes]:
        """Return the serialised model without its graph, and the graph without its weights."""
        names = {weight.name for weight in self.weights}
        graph, outer = onnx.GraphProto(), onnx.ModelProto()
        graph.CopyFrom(self.model.graph)
        del graph.input[:]
        graph.input.extend(value for value in self.model.graph.input if value.name not in names)
        outer.CopyFrom(self.model)
        outer.ClearField("graph")
        return outer.SerializeToString(), graph.SerializeToString()

    def showing_draws(self) -> "Graph":
        """Return a copy whose outputs include the numbers that it draws, for comparisons."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for member in self.draws:
            value = onnx.helper.make_tensor_value_info(draws_name(member), FLOAT, None)
            model.graph.output.append(value)
        return self._replace(model=model)


class _Traced(nn.Module):
    """The traced module: an ensemble, the top k of its probabilities, and members' shares."""

    def __init__(self, ensemble: FusedEnsemble, top_k: int) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.top_k = top_k

    def forward(
        self, frames: list[Tensor], num_frames: Tensor, draws: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        named = dict(zip(self.ensemble.schema.widths, frames, strict=True))
        drawn = dict(zip(self.ensemble.random_names, draws, strict=True))
        shares = self.ensemble.shares(named, num_frames, drawn)
        probabilities = self.ensemble.mix(shares)
        confidences, labels = torch.topk(probabilities, self.top_k, dim=-1)
        # one member's share is the result itself, and an output cannot have two names
        return probabilities, labels, confidences, *(shares if len(shares) > 1 else [])


def build_graph(
    file: TensorFile,
    metadata: FusedMetadata,
    *,
    repeats: int,
    draw_source: DrawSource = DRAW_SOURCE,
    input_types: Sequence[InputType] | None = None,
    opset: Opset | None = None,
) -> Graph:
    """Return the ONNX graph of an open fused file.

    Inputs are the schema's modalities, ``(B, T, D)``, and ``num_frames`` ``(B,)`` int64; outputs
    ``probabilities`` ``(B, C)`` and the k best ``labels`` and ``confidences`` ``(B, k)``.

    Args:
        file: The fused file, which weights are read from while they are written.
        metadata: The file's metadata.
        repeats: R, draws whose probabilities are averaged.
        draw_source: ``fixed`` puts a table of uniform numbers in the file, ``(R, N)`` for each
            member that draws; ``random`` draws ``(B, R, N)`` in each run; ``input`` takes them as
            inputs ``draws_<member>``, R of which is free where every member allows it.
        input_types: The type of each modality's input; None takes the schema's.
        opset: The version of ONNX's operators; None takes the first that has what the members need.

    Raises:
        ExportError: A member's graph is written in a later one, or another package's member cannot
            be exported.
    """
    types = input_types or [modality.value_type for modality in metadata.data_schema.modalities]
    with _quiet():
        ensemble, model = _trace(file, metadata, repeats, draw_source, types, opset)
        written_in = int(model.opset_imports[""])
        _place_foreign(model, ensemble)
        weights, matrices = attach_weights(
            model, file, _cells(ensemble), prefix=PREFIX, opset=written_in
        )
        optimizer.optimize_ir(model)
        place_blocks(model.graph, matrices, is_packing=written_in >= BLOCK_OPSET)
        shares = model.graph.outputs[len(OUTPUTS) :] or model.graph.outputs[:1]
        name_nodes(model, ensemble.names, shares)
        del model.graph.outputs[len(OUTPUTS) :]
        _place_draws(model, ensemble, draw_source)
        held = {weight.name for weight in weights}  # which are inputs too, for now
        refuse_empty_inputs([each for each in model.graph.inputs if each.name not in held], model)
    model.graph.name = "ensemble"
    if written_in == OPSET:  # as ONNX 1.15 writes it: older runtimes refuse any later version
        model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "ensemble-kit", __version__
    draws = {name: getattr(ensemble, draws_name(name)).shape[1] for name in ensemble.random_names}
    are_free = draw_source == "input" and ensemble.repeats_are_free
    return Graph(ir.to_proto(model), weights, draws, are_free, written_in)


def top_k_of(metadata: FusedMetadata) -> int:
    """Return how many classes a file lists for a video: the k of its GAP, or all if fewer."""
    return min(metadata.top_k, metadata.data_schema.num_classes)


def _trace(
    file: TensorFile,
    metadata: FusedMetadata,
    repeats: int,
    draw_source: DrawSource,
    types: Sequence[InputType],
    opset: Opset | None,
) -> tuple[FusedEnsemble, ir.Model]:
    """Return the ensemble and its graph, both without weights."""
    schema = metadata.data_schema
    batch, length = torch.export.Dim("batch"), torch.export.Dim("frames")
    with FakeTensorMode():
        members = {member.name: empty_member(file, member, schema) for member in metadata.members}
        ensemble = FusedEnsemble(
            members, [m.coefficient for m in metadata.members], schema, repeats=repeats
        )
        for module in list(ensemble.modules()):
            if isinstance(module, Recurrence):
                module.arrange_for_onnx()
        frames = [
            torch.zeros(3, 7, modality.width, dtype=getattr(torch, value_type))
            for modality, value_type in zip(schema.modalities, types, strict=True)
        ]
        inputs: list[Any] = [frames, torch.zeros(3, dtype=torch.int64)]
        free: list[Any] = [[{0: batch, 1: length}] * len(frames), {0: batch}]
        if (
            ensemble.random_names
        ):  # with an empty list of inputs, torch drops the names of all dimensions
            draws, dims = _example_draws(ensemble, draw_source, batch)
            inputs.append(draws)
            free.append([dims] * len(draws))
        shares = ensemble.names if len(members) > 1 else ()
        with torch.no_grad(), _exportable():
            program = torch.onnx.export(
                _Traced(ensemble, top_k_of(metadata)).eval(),
                tuple(inputs),
                dynamo=True,
                dynamic_shapes=tuple(free),
                input_names=[*schema.widths, "num_frames", *map(draws_name, ensemble.random_names)],
                output_names=[*OUTPUTS, *map(module_name, shares)],
                opset_version=_opset(ensemble, has_blocks(metadata.members), opset),
                optimize=False,  # the weights have to be attached first
                verbose=False,
            )
    assert program is not None
    return ensemble, program.model


def _opset(ensemble: FusedEnsemble, has_blocks: bool, asked: Opset | None) -> int:
    """Return the operator set to write.

    Raises:
        ExportError: The one that was asked for is older than that of a foreign graph.
    """
    foreign = {name: opset_of(graph) for name, graph in _foreign_graphs(ensemble).items()}
    if asked is None:
        return max([BLOCK_OPSET if has_blocks else OPSET, *foreign.values()])
    for name, opset in foreign.items():
        if opset > asked:
            raise ExportError(
                f"The graph of {name} is in operator set {opset}; --opset {asked} is older.",
                hint=f"Leave --opset out, or import {name} again from an older file.",
            )
    return asked


def _foreign_graphs(ensemble: FusedEnsemble) -> dict[str, onnx.ModelProto]:
    """Return the graphs of the foreign members, by the members' names."""
    members = {name: ensemble.member(name) for name in ensemble.names}
    return {
        name: member.graph for name, member in members.items() if isinstance(member, ForeignModel)
    }


def _place_foreign(model: ir.Model, ensemble: FusedEnsemble) -> None:
    """Replace the operators that stand for foreign graphs by the graphs."""
    opset = model.opset_imports[""]
    for name, proto in _foreign_graphs(ensemble).items():
        foreign = ir.from_proto(proto)
        if foreign.opset_imports[""] != opset:
            version_converter.convert_version(foreign, opset)
        prefix = f"{PREFIX}{member_prefix(name)}{WEIGHTS}"
        inline_foreign(model, foreign, name, prefix=prefix)
        for domain, version in foreign.opset_imports.items():  # also the domain of classical models
            model.opset_imports[domain] = max(version, model.opset_imports.get(domain, 0))
        model.opset_imports.pop(DOMAIN, None)


def _example_draws(
    ensemble: FusedEnsemble, draw_source: DrawSource, batch: Any
) -> tuple[list[Tensor], dict[int, Any]]:
    """Return example draws for each member that draws, and which of their dimensions are free."""
    shape: tuple[int, ...] = (3, ensemble.repeats)
    free = {0: batch}
    if draw_source == "fixed":
        shape, free = (ensemble.repeats,), {}
    elif draw_source == "input" and ensemble.repeats_are_free:
        shape, free = (3, 5), {0: batch, 1: torch.export.Dim("repeats")}
    counts = [getattr(ensemble, draws_name(name)).shape[1] for name in ensemble.random_names]
    return [torch.zeros(*shape, count) for count in counts], free


def _cells(ensemble: FusedEnsemble) -> dict[str, Cell]:
    """Return the kind of every recurrent stack, by the stack's name."""
    return {
        name: module.cell
        for name, module in ensemble.named_modules()
        if isinstance(module, Recurrence)
    }


def _place_draws(model: ir.Model, ensemble: FusedEnsemble, draw_source: DrawSource) -> None:
    """Turn the draws, which were traced as inputs, into tables or operators of the graph."""
    if draw_source == "input":
        return
    graph = model.graph
    for name in ensemble.random_names:
        (value,) = [value for value in graph.inputs if value.name == draws_name(name)]
        graph.inputs.remove(value)
        table = getattr(ensemble, draws_name(name))
        if draw_source == "fixed":
            numbers = draw_table(name, repeats=table.shape[0], num_frames=table.shape[1])
            value.const_value = ir.tensor(numbers.numpy(), name=value.name)
            graph.register_initializer(value)
            continue
        (num_frames,) = [value for value in graph.inputs if value.name == "num_frames"]
        _draw_in_graph(graph, value, num_frames, list(table.shape))


def _draw_in_graph(
    graph: ir.Graph, value: ir.Value, num_frames: ir.Value, shape: list[int]
) -> None:
    """Draw ``(B, R, N)`` new uniform numbers in each run.

    This has to follow the optimisation of the graph, which merges equal operators: two members with
    the same N would draw the same numbers.
    """
    member = str(value.name).removeprefix(draws_name(""))
    name = f"{member}/draws/shape"
    each = ir.Value(name=name, const_value=ir.tensor(shape, name=name))
    graph.register_initializer(each)
    batch = ir.node("Shape", [num_frames])
    whole = ir.node("Concat", [batch.outputs[0], each], attributes={"axis": 0})
    zeros = ir.node("ConstantOfShape", [whole.outputs[0]])
    uniform = ir.node(
        "RandomUniformLike", [zeros.outputs[0]], attributes={"dtype": ir.DataType.FLOAT}
    )
    nodes = [batch, whole, zeros, uniform]
    for node in nodes:
        node.name = f"{member}/draws/{node.op_type}"
    uniform.outputs[0].name = value.name
    value.replace_all_uses_with(uniform.outputs[0])
    graph.insert_before(graph[0], nodes)


@contextmanager
def _exportable() -> Iterator[None]:
    """Refuse a model that PyTorch cannot export: another package's, since the kit's all can."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise ExportError(
            f"PyTorch cannot export a member to ONNX: {reason}.",
            hint="Write the part of your package without steps that depend on its numbers.",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of the exporter, which are meant for its developers."""
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
