"""The weights of an ONNX graph, from a fused file.

Weights keep the type that the fused file stores, and a Cast to float32 follows each, because ONNX
Runtime's CPU provider has no bfloat16 arithmetic (microsoft/onnxruntime #28768). It computes the
Casts once when it opens the file, unless that is switched off. For matrices in blocks see
``ensemble_kit.export.blocks``.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble_kit.choices import BLOCK_OPSET
from ensemble_kit.export.blocks import BlockMatrix
from ensemble_kit.layers.recurrent import ONNX_KINDS, Cell, arranged_for_onnx
from ensemble_kit.networks.weights import read_blocks
from ensemble_kit.serving.onnx_file import Weight
from ensemble_kit.store.blocks import FORMATS, SCALE, SCALE_TYPE, BlockFormat, pack
from ensemble_kit.store.dtypes import BLOCKS_BY_SAFETENSORS, BY_NAME
from ensemble_kit.store.tensor_files import TensorFile

ARRANGED = ".onnx."  # in the names of a recurrent stack's weights that are in ONNX's order


class _Source(NamedTuple):
    """Where an initialiser's values come from: one tensor, or those of a recurrent layer."""

    file: TensorFile
    names: tuple[str, ...]
    cell: Cell | None

    @property
    def is_in_blocks(self) -> bool:
        """Whether the tensor is a matrix in blocks."""
        return self.names[0] + SCALE in self.file.specs

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Describe the initialiser."""
        stored = self.file.specs[self.names[0]].storage_type
        return Weight(name, stored.onnx_number, shape, self._read)

    def _read(self) -> NDArray[np.uint8]:
        tensors = [self.file.tensor(name) for name in self.names]
        tensor = tensors[0] if self.cell is None else arranged_for_onnx(self.cell, tensors)
        return tensor.contiguous().flatten().view(torch.uint8).numpy()


class _BlockSource(NamedTuple):
    """Where the initialisers of a matrix in blocks come from.

    Attributes:
        source: The tensor.
        shape: Shape of the matrix in the fused file.
        block_format: Its format.
        type_name: The kit's name for the type of the whole numbers in the ONNX file: ``int8``,
            ``int4``, or ``uint8`` for two of four bits a byte.
        is_transposed: Whether the fused file stores outputs by inputs; the ONNX file never does.
    """

    source: _Source
    shape: tuple[int, ...]
    block_format: BlockFormat
    type_name: str
    is_transposed: bool

    @classmethod
    def of(cls, source: _Source, shape: tuple[int, ...], opset: int) -> "_BlockSource":
        """Describe a matrix from its entries in the fused file."""
        file, name = source.file, source.names[0]
        dtype = BLOCKS_BY_SAFETENSORS[file.specs[name].dtype]
        block_format = FORMATS[dtype]
        scales = file.specs[name + SCALE].shape
        is_transposed = scales == block_format.scales_shape(shape, 0)
        has_type = opset >= BLOCK_OPSET or block_format.per_byte == 1
        return cls(source, shape, block_format, dtype if has_type else "uint8", is_transposed)

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of inputs and outputs."""
        rows, columns = self.shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    def weights(self, name: str) -> tuple[Weight, Weight]:
        """Describe the initialisers: whole numbers and scales, inputs by outputs."""
        scales_shape = self.block_format.scales_shape(self.sizes, 1)
        are_bytes = self.type_name == "uint8"
        shape = self.block_format.packed_shape(self.sizes) if are_bytes else self.sizes
        data_type = BY_NAME[self.type_name].onnx_number
        return (
            Weight(name, data_type, shape, partial(self._read, False)),
            Weight(name + SCALE, SCALE_TYPE.onnx_number, scales_shape, partial(self._read, True)),
        )

    def _read(self, is_scales: bool) -> NDArray[np.uint8]:
        file, name = self.source.file, self.source.names[0]
        if is_scales:
            return self._arranged(file.tensor(name + SCALE)).numpy().reshape(-1).view(np.uint8)
        whole = self._arranged(read_blocks(file, name, self.shape, path=file.path).values)
        return pack(whole.numpy(), self.block_format).reshape(-1).view(np.uint8)

    def _arranged(self, tensor: Tensor) -> Tensor:
        if self.source.cell is not None:
            tensor = arranged_for_onnx(self.source.cell, [tensor])[0]
        return (tensor.mT if self.is_transposed else tensor).contiguous()


def attach_weights(
    model: ir.Model,
    file: TensorFile,
    cells: Mapping[str, Cell],
    *,
    prefix: str,
    opset: int,
) -> tuple[list[Weight], list[BlockMatrix]]:
    """Turn every initialiser whose values a fused file holds into an input of the graph.

    Args:
        model: A graph whose initialisers have no values; their names lose the prefix.
        file: The fused file, open for as long as the weights may be read.
        cells: The kind of every recurrent stack, by the name of the stack in the file.
        prefix: What the graph's names have before the file's.
        opset: The operator set of the graph, which decides on the type of four bits.

    Returns:
        The initialisers to write in place of the inputs, in the graph's order; and the matrices in
        blocks, which ``place_blocks`` places after the graph is optimised.
    """
    graph = model.graph
    weights: list[Weight] = []
    matrices: list[BlockMatrix] = []
    casts: list[ir.Node] = []
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix(prefix)
        source = _source(file, cells, name)
        if source is None:
            continue  # a constant of the tracer, which has a value
        assert value.shape is not None
        shape = tuple(value.shape.numpy())
        del graph.initializers[str(value.name)]
        if source.is_in_blocks:
            blocks = _BlockSource.of(source, shape[-2:], opset)
            weights += blocks.weights(name)
            matrices.append(_block_matrix(graph, value, blocks, *weights[-2:]))
        else:
            weights.append(source.weight(name, shape))
            casts += _cast(value, _input(graph, weights[-1]), name)
    graph.insert_before(graph[0], casts)
    return weights, matrices


def _block_matrix(
    graph: ir.Graph, value: ir.Value, blocks: _BlockSource, whole: Weight, scales: Weight
) -> BlockMatrix:
    """Let an input stand for a matrix in blocks, and return what will take its place."""
    stand_in = ir.Value(name=f"{whole.name}.exact", shape=value.shape, type=value.type)
    graph.inputs.append(stand_in)
    value.replace_all_uses_with(stand_in)
    return BlockMatrix(
        stand_in, _input(graph, whole), blocks.sizes, _input(graph, scales),
        blocks.block_format, blocks.is_transposed,
    )  # fmt: skip


def _cast(value: ir.Value, stored: ir.Value, name: str) -> list[ir.Node]:
    """Let stored numbers take a value's place; return what converts them to its type."""
    casts: list[ir.Node] = []
    current = stored
    if current.dtype != ir.DataType.FLOAT:
        casts.append(ir.node("Cast", [current], attributes={"to": ir.DataType.FLOAT}))
        casts[-1].name, current = f"{name}/Cast", casts[-1].outputs[0]
    if value.dtype not in (None, ir.DataType.FLOAT):  # that a foreign graph computes in
        casts.append(ir.node("Cast", [current], attributes={"to": value.dtype}))
        casts[-1].name, current = f"{name}/Cast_2", casts[-1].outputs[0]
    if casts:
        current.name, current.shape, current.type = f"{name}.fp32", value.shape, value.type
    value.replace_all_uses_with(current)
    return casts


def _source(file: TensorFile, cells: Mapping[str, Cell], name: str) -> _Source | None:
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
