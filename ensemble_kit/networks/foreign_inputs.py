"""How frames, counts and masks are arranged for the inputs of a foreign graph."""

from typing import NamedTuple

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from ensemble_kit.errors import ForeignModelError
from ensemble_kit.networks.storage import torch_type
from ensemble_kit.store.dtypes import BY_ONNX
from ensemble_kit.store.provenance import InputMetadata

USUAL_RANKS = {"frames": 3, "num_frames": 1, "is_frame": 2}


class GraphInput(NamedTuple):
    """An input of a foreign graph that is mapped to frames, their number or their mask.

    Attributes:
        metadata: What the input is given.
        dtype: Its type.
        sizes: The size of each dimension, None where it is free; empty where the graph does not
            say how many dimensions there are.
    """

    metadata: InputMetadata
    dtype: torch.dtype
    sizes: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """The name of the input."""
        return self.metadata.name

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.sizes) or USUAL_RANKS[self.metadata.holds]

    @property
    def shown(self) -> str:
        """Its dimensions as errors show them, such as ``(?, ?, 1024)``."""
        return f"({', '.join(str(size or '?') for size in self.sizes)})"

    @property
    def frame_axis(self) -> int | None:
        """Which dimension counts the frames; None where no dimension does."""
        if self.metadata.holds == "frames":
            if self.rank == 2:
                return None
            return 2 if self.metadata.layout == "channels-first" else 1
        if self.metadata.holds == "num_frames":
            return None
        (axis,) = self.mask_axes if len(self.mask_axes) == 1 else (1,)
        return axis

    @property
    def mask_axes(self) -> tuple[int, ...]:
        """The dimensions of a mask that can count the frames: all after the first but sizes 1."""
        axes = range(1, self.rank)
        return tuple(axis for axis in axes if not self.sizes or self.sizes[axis] != 1)

    @property
    def feature_axis(self) -> int:
        """Which dimension of an input of frames counts their features."""
        return 1 if self.metadata.layout == "channels-first" else self.rank - 1

    @property
    def length(self) -> int | None:
        """T, if the graph takes exactly this many frames of each video."""
        if not self.sizes or self.frame_axis is None:
            return None
        return self.sizes[self.frame_axis]

    def arrange(self, values: Tensor) -> Tensor:
        """Return values in the type, length and dimensions of the input.

        Args:
            values: Frames ``(B, T, D)``, a mask ``(B, T)`` or counts ``(B,)``.
        """
        values = values.to(self.dtype)
        if self.length is not None:
            values = _of_length(values, self.length)
        if self.metadata.holds == "frames":
            if self.rank == 2:
                return values[:, 0]
            return values.transpose(1, 2) if self.frame_axis == 2 else values
        for axis in range(1, self.rank):
            if axis != self.frame_axis:
                values = values.unsqueeze(axis)
        return values


def sizes_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the dimensions of a value, 0 where one is free."""
    return tuple(max(0, each.dim_value) for each in value.type.tensor_type.shape.dim)


def type_of(value: onnx.ValueInfoProto, model: str) -> torch.dtype:
    """Return the type of an input.

    Args:
        value: The input.
        model: What errors call its graph.

    Raises:
        ForeignModelError: PyTorch has no such type.
    """
    stored = BY_ONNX.get(value.type.tensor_type.elem_type)
    if stored is None:
        type_name = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        raise ForeignModelError(
            f"{model}: the input {value.name} holds {type_name}, which frames and counts cannot "
            "be converted to.",
            hint="Export the model with inputs of float32, uint8 or int64.",
        )
    return torch_type(stored)


def _of_length(values: Tensor, length: int) -> Tensor:
    """Return ``length`` frames of each video, with zeros after those that are shorter."""
    padding = values.new_zeros((values.shape[0], length, *values.shape[2:]))
    return torch.cat([values, padding], dim=1)[:, :length]
