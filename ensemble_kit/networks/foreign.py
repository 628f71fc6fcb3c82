"""Foreign models: an ONNX graph that another framework wrote, and what its inputs are given.

Frames become the graph's inputs in PyTorch, so that the same lines feed ONNX Runtime here and are
traced where many members become one graph. In that graph the foreign graph is one operator, which
the export replaces by its nodes.
"""

from collections.abc import Mapping

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from ensemble_kit.data.schema import Schema
from ensemble_kit.layers.frame_preparation import (
    PreparedFrames,
    mark_frames,
    prepare_frames,
    quantise,
)
from ensemble_kit.networks.foreign_inputs import GraphInput, sizes_of, type_of
from ensemble_kit.networks.foreign_session import open_foreign, run_foreign
from ensemble_kit.networks.storage import torch_type
from ensemble_kit.store.dtypes import BY_ONNX
from ensemble_kit.store.provenance import MappingMetadata

GRAPH = "graph"  # the tensor that holds the serialised graph, in files
WEIGHTS = "weights."  # the prefix of the names of its weights in files
DOMAIN, OPERATOR, MEMBER = "ensemble_kit", "Foreign", "member"  # the operator while tracing


class ForeignModel(nn.Module):
    """A graph that another framework wrote, between the kit's frames and probabilities.

    A video without frames is given to the graph as one frame of zeros, because many graphs divide
    by the number of frames.

    Args:
        graph: The model; its weights are inputs of the graph, beside those that are mapped.
        mapping: What its other inputs are given.
        schema: The modalities and classes.
        name: What errors call it, and the operator while tracing.

    Attributes:
        inputs: The inputs of the graph that are mapped.
        weight_specs: The type and shape of its weights by name.
        weights: Their values, in these types; to be set before the model is run.
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
        mapped = {metadata.name: metadata for metadata in mapping.inputs}
        inputs = graph.graph.input
        self.inputs = [
            GraphInput(
                mapped[value.name],
                type_of(value, name),
                tuple(size or None for size in sizes_of(value)),
            )
            for value in inputs
            if value.name in mapped
        ]
        self.weight_specs = {
            value.name: (type_of(value, name), sizes_of(value))
            for value in inputs
            if value.name not in mapped
        }
        self.weights: Mapping[str, Tensor] = {}
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def draws_for(self, name: str, *, repeats: int) -> None:
        """Return None: nothing is drawn."""

    def forward(
        self, frames: Mapping[str, Tensor], num_frames: Tensor, draws: Tensor | None = None
    ) -> Tensor:
        """Return the probability of every class; see ``SubModel.forward``."""
        return self.classify(prepare_frames(self.schema.ordered(frames), num_frames), draws)

    def classify(self, prepared: PreparedFrames, draws: Tensor | None = None) -> Tensor:
        """Return the probability of every class, ``(B, C)`` float32, for prepared frames.

        Raises:
            ForeignModelError: ONNX Runtime cannot run the graph on these frames.
        """
        feed = self.feed(prepared)
        (output,) = self.graph.graph.output
        videos, length = prepared.is_frame.shape
        if torch.onnx.is_in_onnx_export():
            values = torch.onnx.ops.symbolic(
                f"{DOMAIN}::{OPERATOR}",
                tuple(feed.values()),
                {MEMBER: self.name},
                dtype=torch_type(BY_ONNX[output.type.tensor_type.elem_type]),
                shape=(videos, self.schema.num_classes),
            )
        else:
            device = prepared.is_frame.device
            values = run_foreign(
                self._session(device.type),
                feed,
                output.name,
                name=self.name,
                size=(videos, length),
                hint="Import the model again from records with videos as long as these.",
            ).to(device)
        return self.activate(values)

    def feed(self, prepared: PreparedFrames) -> dict[str, Tensor]:
        """Return the value of each mapped input of the graph, by its name."""
        counts = prepared.is_frame.sum(dim=1).clamp_min(1)
        fed = {}
        for given in self.inputs:
            if given.metadata.holds == "frames":
                parts = [self._frames_of(name, prepared) for name in given.metadata.modalities]
                values = torch.cat([part.to(given.dtype) for part in parts], dim=-1)
            elif given.metadata.holds == "is_frame":
                values = mark_frames(counts, prepared.is_frame.shape[1])
            else:
                values = counts if self._length is None else counts.clamp_max(self._length)
            fed[given.name] = given.arrange(values)
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
                stored = quantise(stored)  # the inputs of a fused graph may be dequantised already
            padding = torch.zeros((), dtype=stored.dtype, device=stored.device)
            return torch.where(prepared.is_frame.unsqueeze(-1), stored, padding)
        joint = prepared.normalised if self.mapping.frames == "normalised" else prepared.joint
        start = sum(self.schema.widths[before] for before in names[: names.index(name)])
        return joint[..., start : start + modality.width]

    def _session(self, device: str) -> onnxruntime.InferenceSession:
        if device not in self._sessions:
            self._sessions[device] = open_foreign(self.graph, self.weights, device, self.name)
        return self._sessions[device]


def opset_of(graph: onnx.ModelProto) -> int:
    """Return the version of ONNX's operators that a graph is written in."""
    return max(int(each.version) for each in graph.opset_import if each.domain == "")
