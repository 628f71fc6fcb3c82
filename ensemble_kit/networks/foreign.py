"""Models that another framework made: an ONNX graph, and what its inputs are given.

Imports ``layers``, ``provenance``, ``runtime`` and ``storage``. Frames become the graph's inputs in
PyTorch, so that the same lines feed ONNX Runtime here and are traced where many members become one
graph; there the imported graph itself is one operator, which ``onnx_graph`` replaces by its nodes.
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import onnx
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor, nn

from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import ForeignModelError
from ensemble_kit.layers.frame_preparation import (
    PreparedFrames,
    mark_frames,
    prepare_frames,
    quantise,
)
from ensemble_kit.networks.storage import torch_type
from ensemble_kit.serving.opening import open_session
from ensemble_kit.store.dtypes import BY_ONNX
from ensemble_kit.store.provenance import InputMetadata, MappingMetadata

GRAPH = "graph"  # the tensor that holds the serialised graph, in files
WEIGHTS = "weights."  # what the name of each of its weights follows there
DOMAIN, OPERATOR, MEMBER = "ensemble_kit", "Imported", "member"  # the operator while tracing


class GraphInput(NamedTuple):
    """An input of an imported graph.

    Attributes:
        record: What it is given.
        dtype: Its type.
        sizes: Its dimensions, None where one is free; empty where the graph does not tell.
    """

    record: InputMetadata
    dtype: torch.dtype
    sizes: tuple[int | None, ...]

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.sizes) or {"frames": 3, "num_frames": 1, "is_frame": 2}[self.record.holds]

    @property
    def length(self) -> int | None:
        """T, where the graph takes that many frames of each video and no other number."""
        has_frames = (self.record.holds, len(self.sizes)) in {("frames", 3), ("is_frame", 2)}
        return self.sizes[1] if has_frames else None


class ForeignModel(nn.Module):
    """A graph that another framework made, between the kit's frames and probabilities.

    A video without frames is given to the graph as one frame of zeros, for many a graph divides by
    how many there are.

    Args:
        graph: The model; its weights are inputs of the graph, beside those that are mapped.
        mapping: What its other inputs are given.
        schema: The modalities and classes.
        name: What faults, and the operator while tracing, call it.

    Attributes:
        inputs: Those of the graph that are mapped.
        weight_specs: The type and shape of its weights by name.
        weights: Their values, in these types; to be set before it is run.
    """

    num_draws = None
    loops_over_repeats = False

    def __init__(
        self,
        graph: onnx.ModelProto,
        mapping: MappingMetadata,
        schema: Schema,
        *,
        name: str,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.mapping = mapping
        self.schema = schema
        self.name = name
        mapped = {record.name: record for record in mapping.inputs}
        inputs = graph.graph.input
        self.inputs = [
            GraphInput(
                mapped[v.name], _type_of(v, name), tuple(size or None for size in _sizes_of(v))
            )
            for v in inputs
            if v.name in mapped
        ]
        self.weight_specs = {
            v.name: (_type_of(v, name), _sizes_of(v)) for v in inputs if v.name not in mapped
        }
        self.weights: Mapping[str, Tensor] = {}
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def draws_for(self, name: str, *, repeats: int) -> None:
        """Return None: nothing is drawn."""

    def forward(
        self, frames: Mapping[str, Tensor], num_frames: Tensor, draws: Tensor | None = None
    ) -> Tensor:
        """Return the probability of every class; see ``SubModel.forward``."""
        ordered = {name: frames[name] for name in self.schema.widths}
        return self.classify(prepare_frames(ordered, num_frames), draws)

    def classify(self, prepared: PreparedFrames, draws: Tensor | None = None) -> Tensor:
        """Return the probability of every class, ``(B, C)`` float32, for prepared frames."""
        feed = self.feed(prepared)
        if torch.onnx.is_in_onnx_export():
            output = torch.onnx.ops.symbolic(
                f"{DOMAIN}::{OPERATOR}",
                tuple(feed.values()),
                {MEMBER: self.name},
                dtype=torch_type(BY_ONNX[self.graph.graph.output[0].type.tensor_type.elem_type]),
                shape=(prepared.is_frame.shape[0], self.schema.num_classes),
            )
        else:
            device = prepared.is_frame.device
            arrays = {name: values.cpu().numpy() for name, values in feed.items()}
            (found,) = self._session(device.type).run(None, arrays)
            output = torch.from_numpy(found).to(device)
        return self.activate(output)

    def feed(self, prepared: PreparedFrames) -> dict[str, Tensor]:
        """Return what each input of the graph is given, by its name."""
        length = prepared.is_frame.shape[1]
        counts = prepared.is_frame.sum(dim=1).clamp_min(1)
        fed = {}
        for given in self.inputs:
            if given.record.holds == "frames":
                parts = [self._frames_of(name, prepared) for name in given.record.modalities]
                values = torch.cat([part.to(given.dtype) for part in parts], dim=-1)
                values = _of_length(values, given.length)
                fed[given.record.name] = values[:, 0] if given.rank == 2 else values
            elif given.record.holds == "is_frame":
                values = _of_length(mark_frames(counts, length), given.length)
                fed[given.record.name] = values.to(given.dtype)
            else:
                values = counts if self._length is None else counts.clamp_max(self._length)
                values = values.to(given.dtype)
                fed[given.record.name] = values.unsqueeze(1) if given.rank == 2 else values
        return fed

    def activate(self, output: Tensor) -> Tensor:
        """Return the probabilities that the graph's output stands for, float32."""
        output = output.to(torch.float32)
        if self.mapping.activation == "sigmoid":
            return output.sigmoid()
        return output.softmax(dim=-1) if self.mapping.activation == "softmax" else output

    @property
    def _length(self) -> int | None:
        return min((given.length for given in self.inputs if given.length), default=None)

    def _frames_of(self, name: str, prepared: PreparedFrames) -> Tensor:
        """Return the frames ``(B, T, D)`` of one modality, padding 0."""
        names = list(self.schema.widths)
        modality = self.schema.modalities[names.index(name)]
        if self.mapping.frames == "raw":
            stored = prepared.stored[name]
            if modality.value_type == "uint8" and stored.is_floating_point():
                stored = quantise(stored)  # a graph whose inputs are dequantised already
            padding = torch.zeros((), dtype=stored.dtype, device=stored.device)
            return torch.where(prepared.is_frame.unsqueeze(-1), stored, padding)
        joint = prepared.normalised if self.mapping.frames == "normalised" else prepared.joint
        start = sum(self.schema.widths[before] for before in names[: names.index(name)])
        return joint[..., start : start + modality.width]

    def _session(self, device: str) -> onnxruntime.InferenceSession:
        if device not in self._sessions:
            self._sessions[device] = _open(self.graph, self.weights, device, self.name)
        return self._sessions[device]


def opset_of(graph: onnx.ModelProto) -> int:
    """Return the version of ONNX's operators that a graph is written in."""
    return max(int(each.version) for each in graph.opset_import if each.domain == "")


def _sizes_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(each.dim_value for each in value.type.tensor_type.shape.dim)


def _type_of(value: onnx.ValueInfoProto, model: str) -> torch.dtype:
    stored = BY_ONNX.get(value.type.tensor_type.elem_type)
    if stored is None:
        type_name = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        raise ForeignModelError(
            f"{model}: the input {value.name} holds {type_name}, which nothing can be mapped to.",
            hint="Export the model with inputs of float32, uint8 or int64.",
        )
    return torch_type(stored)


def _of_length(values: Tensor, length: int | None) -> Tensor:
    """Return ``length`` frames of each video, zeros where there are fewer; None leaves them."""
    if length is None:
        return values
    padding = values.new_zeros((values.shape[0], length, *values.shape[2:]))
    return torch.cat([values, padding], dim=1)[:, :length]


def _open(
    graph: onnx.ModelProto, weights: Mapping[str, Tensor], device: str, name: str
) -> onnxruntime.InferenceSession:
    """Open a graph whose weights stay where they are in memory.

    Raises:
        ProviderError: ONNX Runtime cannot open it, or not on that device.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    del model.graph.input[:]
    model.graph.input.extend(value for value in graph.graph.input if value.name not in weights)
    for value in graph.graph.input:
        if value.name in weights:
            model.graph.initializer.append(_held_elsewhere(value))
    options = onnxruntime.SessionOptions()
    if weights:
        values = [_ort_value(tensor) for tensor in weights.values()]
        options.add_external_initializers(list(weights), values)
    return open_session(
        model.SerializeToString(),
        device="cuda" if device == "cuda" else "cpu",
        name=f"the graph of {name}",
        hint="Import the model again from its ONNX file.",
        options=options,
    )


def _held_elsewhere(value: onnx.ValueInfoProto) -> TensorProto:
    """Return an initialiser whose values ONNX Runtime is given by its name."""
    tensor = value.type.tensor_type
    shape = [each.dim_value for each in tensor.shape.dim]
    held = TensorProto(
        name=value.name,
        data_type=tensor.elem_type,
        dims=shape,
        data_location=TensorProto.EXTERNAL,
    )
    size = prod(shape) * BY_ONNX[tensor.elem_type].num_bytes
    for key, text in (("location", "_"), ("offset", "0"), ("length", str(size))):
        held.external_data.add(key=key, value=text)
    return held


def _ort_value(tensor: Tensor) -> onnxruntime.OrtValue:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
