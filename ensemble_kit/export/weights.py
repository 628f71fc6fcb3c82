"""The weights of an ONNX graph, from a fused file.

Imports ``checkpoints``, ``layers``, ``onnx_file`` and ``storage``.

Weights stay in the type of the fused file, with a Cast to float32 behind each and for int8 a Mul by
its scales, because ONNX Runtime's CPU provider has no bfloat16 arithmetic (microsoft/onnxruntime
#28768). It computes both once when it opens the file, unless that is switched off.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ensemble_kit.layers.recurrent import ONNX_KINDS, arranged_for_onnx
from ensemble_kit.networks.storage import SCALE
from ensemble_kit.serving.onnx_file import Weight
from ensemble_kit.store.tensor_files import TensorFile

ARRANGED = ".onnx."  # in the name of a recurrent stack's weight that is in ONNX's order


class _Source(NamedTuple):
    """Where an initialiser's values come from: one tensor, or those of a recurrent layer."""

    file: TensorFile
    names: tuple[str, ...]
    cell: Literal["gru", "lstm"] | None

    def weight(self, name: str, shape: tuple[int, ...], suffix: str = "") -> Weight:
        """Describe the initialiser, or with a suffix its scales."""
        stored = self.file.specs[self.names[0] + suffix].storage_type
        return Weight(name + suffix, stored.onnx_number, shape, partial(self._read, suffix))

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """The shape of the scales; None where there are none."""
        spec = self.file.specs.get(self.names[0] + SCALE)
        if spec is None:
            return None
        return spec.shape if self.cell is None else (1, *spec.shape)

    def _read(self, suffix: str) -> NDArray[np.uint8]:
        tensors = [self.file.tensor(name + suffix) for name in self.names]
        tensor = tensors[0] if self.cell is None else arranged_for_onnx(self.cell, tensors)
        return tensor.contiguous().flatten().view(torch.uint8).numpy()


def attach_weights(
    model: ir.Model,
    file: TensorFile,
    cells: Mapping[str, Literal["gru", "lstm"]],
    *,
    prefix: str,
) -> list[Weight]:
    """Make every initialiser that a fused file holds an input of the graph, for now.

    Args:
        model: A graph whose initialisers have no values; the fused file's lose their prefix.
        file: The fused file, open for as long as the weights may be read.
        cells: The kind of every recurrent stack by its name in the file.
        prefix: What the graph puts before names of the file.

    Returns:
        The initialisers to be written in place of the inputs, in the graph's order.
    """
    graph = model.graph
    weights: list[Weight] = []
    casts: list[ir.Node] = []
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix(prefix)
        source = _source(file, cells, name)
        if source is None:
            continue  # a constant of the tracer's, which has a value
        assert value.shape is not None
        shape = tuple(value.shape.numpy())
        stored = source.weight(name, shape)
        del graph.initializers[str(value.name)]
        weights.append(stored)
        current = _input(graph, stored)
        if current.dtype != ir.DataType.FLOAT:
            casts.append(ir.node("Cast", [current], attributes={"to": ir.DataType.FLOAT}))
            casts[-1].name, current = f"{name}/Cast", casts[-1].outputs[0]
        if source.scale_shape is not None:
            weights.append(source.weight(name, source.scale_shape, SCALE))
            scale = _input(graph, weights[-1])
            casts.append(ir.node("Mul", [current, scale], name=f"{name}/Mul"))
            current = casts[-1].outputs[0]
        if value.dtype not in (None, ir.DataType.FLOAT):  # what an imported graph computes in
            casts.append(ir.node("Cast", [current], attributes={"to": value.dtype}))
            casts[-1].name, current = f"{name}/Cast_2", casts[-1].outputs[0]
        if current is not None and current.producer() is not None:
            current.name, current.shape, current.type = f"{name}.fp32", value.shape, value.type
        value.replace_all_uses_with(current)
    graph.insert_before(graph[0], casts)
    return weights


def _source(
    file: TensorFile, cells: Mapping[str, Literal["gru", "lstm"]], name: str
) -> _Source | None:
    if name in file.specs:
        return _Source(file, (name,), None)
    stack, found, leaf = name.rpartition(ARRANGED)
    if not found:
        return None
    kind, _, place = leaf.rpartition("_l")
    names = tuple(f"{stack}.cells.{part}_l{place}" for part in ONNX_KINDS[kind])
    return _Source(file, names, cells[stack])


def _input(graph: ir.Graph, weight: Weight) -> ir.Value:
    value = ir.Value(
        name=weight.name,
        shape=ir.Shape(weight.shape),
        type=ir.TensorType(ir.DataType(weight.data_type)),
    )
    graph.inputs.append(value)
    return value
