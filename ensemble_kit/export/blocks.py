"""Matrices in blocks in an ONNX graph, so that ONNX Runtime computes from the packed numbers.

``DequantizeLinear`` with a ``block_size``, straight into the second input of ``MatMul``, becomes
one kernel when ONNX Runtime opens the file. Anything between the two prevents that, and the matrix
is then converted in every run. So transposed matrices are stored as ``MatMul`` reads them, the
factors of a batch norm go into the scales, ``Gemm`` becomes ``MatMul`` and ``Add``, and a product
by several matrices side by side becomes several products, and a Relu or Clip after one becomes Max
and Min. Every other use of a matrix, such as by a
recurrent operator, reads it from operators that ONNX Runtime computes once, at opening.

Before operator set 21 there is no ``block_size``, nor a type of four bits. A file for an older
runtime holds the same bytes, those of ``int4`` as uint8, and reads every matrix in this second way.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ensemble_kit.store.blocks import BlockFormat

FLOAT = ir.DataType.FLOAT


class BlockMatrix(NamedTuple):
    """A matrix in blocks that becomes part of a graph.

    Attributes:
        value: The input that stands for it in the graph, in the shape that the graph expects.
        whole: The whole numbers, ``(I, O)``; or their bytes, ``(ceil(I * O / 2),)`` uint8, two
            numbers of four bits each.
        sizes: I and O, the numbers of inputs and outputs.
        scales: ``(ceil(I / size), O)``, float16.
        block_format: Its format.
        is_transposed: Whether ``value`` is outputs by inputs.
    """

    value: ir.Value
    whole: ir.Value
    sizes: tuple[int, int]
    scales: ir.Value
    block_format: BlockFormat
    is_transposed: bool


class _View(NamedTuple):
    """A matrix as a node reads it, possibly transposed, possibly with a factor for each output."""

    matrix: BlockMatrix
    is_transposed: bool
    factor: ir.Value | None = None


def place_blocks(graph: ir.Graph, matrices: Sequence[BlockMatrix], *, is_packing: bool) -> None:
    """Connect every use of the matrices to their numbers, packed where possible.

    A matrix that several products share is packed for none of them: ONNX Runtime would make one
    conversion for all, and run it each time.

    Args:
        graph: An optimised graph, so that the operators after a matrix are those that will be run.
        matrices: Matrices whose values have no producer. Their values have no uses afterwards.
        is_packing: Whether the graph's operator set has packed products; otherwise every matrix is
            converted once.
    """
    views = {matrix.value: _View(matrix, matrix.is_transposed) for matrix in matrices}
    if is_packing:
        _split_products(graph, views)
    for value, view in views.items():
        products = list(_products(graph, value, view)) if is_packing else []
        if len(products) == 1:
            _pack(graph, *products[0])
        _drop_unused(graph, value)
        if value.uses():
            value.replace_all_uses_with(_converted(graph, view.matrix))
        graph.inputs.remove(value)
    graph.sort()


def _products(graph: ir.Graph, value: ir.Value, view: _View) -> Iterator[tuple[ir.Node, _View]]:
    """Yield the products that a matrix leads to and that could be packed."""
    for node, index in value.uses():
        if node.graph is not graph:  # in a branch or a loop
            continue
        if _is_product(node, index, view):
            yield node, view
        elif node.op_type == "Transpose":
            turned = view._replace(is_transposed=not view.is_transposed)
            yield from _products(graph, node.outputs[0], turned)
        elif node.op_type == "Mul" and _is_by_output(node.inputs[1 - index], view):
            scaled = view._replace(factor=node.inputs[1 - index])
            yield from _products(graph, node.outputs[0], scaled)


def _pack(graph: ir.Graph, node: ir.Node, view: _View) -> None:
    """Replace a product by one that ONNX Runtime computes from packed numbers."""
    assert node.inputs[0] is not None
    product = _like(graph, node, "MatMul", [node.inputs[0], _dequantised(graph, node, view)])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        product = _like(graph, node, "Add", [product, bias])
    _replace(graph, node, product)
    for after, _ in list(product.uses()):
        value = after.outputs[0] if after.op_type == "Add" else product
        for bounded, _ in list(value.uses()):
            if bounded.op_type in {"Relu", "Clip"}:
                _write_bounds(graph, bounded)


def _write_bounds(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a Relu or Clip after a product by Max and Min.

    ONNX Runtime takes either for a part of the product, looks for a quantised result after it, and
    finding none leaves the matrix to be converted in every run.
    """
    given, *bounds = node.inputs
    if node.op_type == "Relu":
        bounds = [_constant(graph, "blocks/zero", np.array(0, np.float32))]
    assert given is not None
    value = given
    for operator, bound in zip(("Max", "Min"), bounds, strict=False):
        if bound is not None:
            value = _like(graph, node, operator, [value, bound])
    if value is not given:
        _replace(graph, node, value)


def _is_by_output(factor: ir.Value | None, view: _View) -> bool:
    """Return whether a factor has one number for each output: a row vector for ``(I, O)``."""
    if view.is_transposed or view.factor is not None or factor is None or factor.shape is None:
        return False
    num_outputs = view.matrix.sizes[1]
    return tuple(factor.shape) in {(num_outputs,), (1, num_outputs)}


def _is_product(node: ir.Node, index: int, view: _View) -> bool:
    if index != 1:
        return False
    if node.op_type == "MatMul":
        return not view.is_transposed
    if node.op_type != "Gemm" or node.attributes.get_int("transA", 0) == 1:
        return False
    is_plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return is_plain and (node.attributes.get_int("transB", 0) == 1) == view.is_transposed


def _dequantised(graph: ir.Graph, before: ir.Node, view: _View) -> ir.Value:
    """Return the matrix as a packed product has to read it."""
    name = str(view.matrix.whole.name)
    scales = _node(graph, before, "Cast", [view.matrix.scales], f"{name}/scale/Cast", to=FLOAT)
    if view.factor is not None:
        scales = _node(graph, before, "Mul", [scales, view.factor], f"{name}/scale/Mul")
    matrix = _node(
        graph, before, "DequantizeLinear", [view.matrix.whole, scales], f"{name}/DequantizeLinear",
        axis=0, block_size=view.matrix.block_format.size,
    )  # fmt: skip
    matrix.shape, matrix.type = view.matrix.whole.shape, ir.TensorType(FLOAT)
    return matrix


def _split_products(graph: ir.Graph, views: Mapping[ir.Value, _View]) -> None:
    """Split a product by concatenated matrices into a concatenation of products by each."""
    for concat in [node for node in graph if node.op_type == "Concat"]:
        parts = [value for value in concat.inputs if value is not None and value in views]
        users = [user for user, _ in concat.outputs[0].uses()]
        if len(parts) < len(concat.inputs) or concat.attributes.get_int("axis", 0) != 1:
            continue
        if not all(
            user.op_type == "MatMul" and user.inputs[1] is concat.outputs[0] for user in users
        ):
            continue
        for user in users:
            left = user.inputs[0]
            assert left is not None
            products = [_like(graph, user, "MatMul", [left, part]) for part in parts]
            _replace(graph, user, _like(graph, user, "Concat", products, axis=-1))
        graph.remove(concat, safe=True)


def _converted(graph: ir.Graph, matrix: BlockMatrix) -> ir.Value:
    """Return the matrix in float, from operators that are computed once.

    ``DequantizeLinear`` would not be: ONNX Runtime never computes it when it opens a file.
    """
    name, first = str(matrix.whole.name), graph[0]
    num_inputs = matrix.sizes[0]
    size = matrix.block_format.size
    index = _constant(graph, f"blocks/{num_inputs}/{size}", np.arange(num_inputs) // size)
    scales = _node(graph, first, "Cast", [matrix.scales], f"{name}/scale/Cast_once", to=FLOAT)
    spread = _node(graph, first, "Gather", [scales, index], f"{name}/scale/Gather", axis=0)
    are_bytes = matrix.whole.dtype == ir.DataType.UINT8
    whole = _unpacked(graph, first, matrix) if are_bytes else matrix.whole
    numbers = _node(graph, first, "Cast", [whole], f"{name}/Cast", to=FLOAT)
    if are_bytes:
        eight = _constant(graph, "blocks/8", np.array(8, np.float32))
        numbers = _node(graph, first, "Sub", [numbers, eight], f"{name}/Sub")
    current = _node(graph, first, "Mul", [numbers, spread], f"{name}/Mul")
    if matrix.is_transposed:
        current = _node(graph, first, "Transpose", [current], f"{name}/Transpose", perm=[1, 0])
    wanted = matrix.value
    if wanted.shape is not None and wanted.shape.rank() == 3:  # a recurrent operator's direction
        axes = _constant(graph, "blocks/axes", np.array([0]))
        current = _node(graph, first, "Unsqueeze", [current, axes], f"{name}/Unsqueeze")
    if wanted.dtype not in (None, FLOAT):  # what a foreign graph computes in
        current = _node(graph, first, "Cast", [current], f"{name}/Cast_2", to=wanted.dtype)
    current.shape, current.type = wanted.shape, wanted.type
    return current


def _unpacked(graph: ir.Graph, before: ir.Node, matrix: BlockMatrix) -> ir.Value:
    """Return whole numbers of four bits plus 8, from 1 to 15, uint8 ``(I, O)``, from their bytes.

    Turning over the highest of four bits in two's complement adds 8; numbers without a sign can be
    shifted.
    """
    name, num_values = str(matrix.whole.name), prod(matrix.sizes)

    def step(operator: str, part: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        return _node(graph, before, operator, inputs, f"{name}/{part}", **attributes)

    def reshaped(value: ir.Value, part: str, *sizes: int) -> ir.Value:
        shape = _constant(graph, "/".join(("blocks/shape", *map(str, sizes))), np.array(sizes))
        return step("Reshape", part, value, shape)

    four = _constant(graph, "blocks/bits", np.array(4, np.uint8))
    highest = _constant(graph, "blocks/highest", np.array(0x88, np.uint8))
    pairs = step("BitwiseXor", "turned", matrix.whole, highest)
    cut = step("BitShift", "cut", pairs, four, direction="LEFT")
    lower = step("BitShift", "lower", cut, four, direction="RIGHT")
    upper = step("BitShift", "upper", pairs, four, direction="RIGHT")
    columns = [reshaped(lower, "left", -1, 1), reshaped(upper, "right", -1, 1)]
    values = reshaped(step("Concat", "pairs", *columns, axis=1), "flat", -1)
    if num_values % 2 == 1:  # four bits of the last byte are no number
        start, end = (_constant(graph, f"blocks/{at}", np.array([at])) for at in (0, num_values))
        values = step("Slice", "numbers", values, start, end)
    return reshaped(values, "matrix", *matrix.sizes)


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Return the constant of a name, which is added to the graph on its first use."""
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def _drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove the nodes that led only from a value to products that are now packed."""
    for node, _ in list(value.uses()):
        for output in node.outputs:
            _drop_unused(graph, output)
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)


def _like(
    graph: ir.Graph, node: ir.Node, operator: str, inputs: Sequence[ir.Value], **attributes: int
) -> ir.Value:
    """Insert an operator that takes over part of a node's work, and will be named as the node."""
    output = _node(graph, node, operator, inputs, "", **attributes)
    producer = output.producer()
    assert producer is not None
    producer.metadata_props.update(node.metadata_props)
    output.type = ir.TensorType(FLOAT)
    return output


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Replace the output of a node by a value, and remove the node."""
    output = node.outputs[0]
    value.name, value.shape, value.type = output.name, output.shape, output.type
    output.name = None
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _node(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value],
    name: str,
    **attributes: int | str | list[int],
) -> ir.Value:
    node = ir.node(operator, inputs, attributes=attributes or None, name=name or None)
    graph.insert_before(before, node)
    return node.outputs[0]
