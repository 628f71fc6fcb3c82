"""Which uses of a matrix in blocks are packed, and how that is counted."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ensemble_kit.export.blocks import BlockMatrix, place_blocks
from ensemble_kit.export.shares import shares_of_run
from ensemble_kit.store.blocks import FORMATS, pack

NUM_INPUTS, NUM_OUTPUTS = 40, 6  # inputs and outputs; the first is no multiple of a block
SIZE = NUM_INPUTS * NUM_OUTPUTS
ROWS_IN, ROWS_OUT = (NUM_INPUTS, NUM_OUTPUTS), (NUM_OUTPUTS, NUM_INPUTS)  # shapes of a matrix
TYPES = {"int8": TensorProto.INT8, "int4": TensorProto.INT4}


def graph_of(nodes, *, shape=ROWS_IN, dtype="int4", random=None):
    """Return a model of some nodes that read ``W``, placed in blocks, and the matrix."""
    random = random or np.random.default_rng(0)
    block_format = FORMATS[dtype]
    whole = random.integers(-7, 8, ROWS_IN).astype(np.int8)
    scales = random.random(block_format.scales_shape(ROWS_IN, 1)).astype(np.float16)
    others = {
        "factor": random.random(NUM_OUTPUTS),
        "bias": random.random(NUM_OUTPUTS),
        "row": random.random(NUM_INPUTS),
    }
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", NUM_INPUTS])]
    values += [
        helper.make_tensor_value_info("W", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("w", TYPES[dtype], ROWS_IN),
        helper.make_tensor_value_info("s", TensorProto.FLOAT16, scales.shape),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.astype(np.float32))
        for name, array in others.items()
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", "N"])
    graph = helper.make_graph(nodes, "g", values, [y], constants)
    opset = helper.make_opsetid("", 21)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=10))
    named = {value.name: value for value in model.graph.inputs}
    place_blocks(
        model.graph,
        [BlockMatrix(named["W"], named["w"], ROWS_IN, named["s"], block_format, shape != ROWS_IN)],
        is_packing=True,
    )
    proto = ir.to_proto(model)
    del proto.graph.input[1:]
    packed = pack(whole, block_format).tobytes()
    proto.graph.initializer.append(helper.make_tensor("w", TYPES[dtype], ROWS_IN, packed, raw=True))
    proto.graph.initializer.append(
        helper.make_tensor("s", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True)
    )
    onnx.checker.check_model(proto, full_check=True)
    factors = np.repeat(scales.astype(np.float32), block_format.size, axis=0)[:NUM_INPUTS]
    return proto, whole * factors, others


def run(proto, tmp_path, x):
    """Return the output with exact sums, and how the matrix's numbers were used."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "run")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {"x": x})
    nothing_plain = SimpleNamespace(members=())
    return output, shares_of_run(tmp_path / session.end_profiling(), nothing_plain, {"w": SIZE})


def node(operator, inputs, output, **attributes):
    return helper.make_node(operator, inputs, [output], name=f"m/{output}", **attributes)


PACKED = {
    "a product": (
        [node("MatMul", ["x", "W"], "y")],
        ROWS_IN,
        lambda x, w, o: x @ w,
    ),
    "a transposed matrix": (
        [node("Transpose", ["W"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")],
        ROWS_OUT,
        lambda x, w, o: x @ w,
    ),
    "a factor for each output": (
        [node("Mul", ["W", "factor"], "f"), node("Gemm", ["x", "f", "bias"], "y")],
        ROWS_IN,
        lambda x, w, o: x @ (w * o["factor"]) + o["bias"],
    ),
    "a Gemm": (
        [node("Gemm", ["x", "W", "bias"], "y", transB=1)],
        ROWS_OUT,
        lambda x, w, o: x @ w + o["bias"],
    ),
}
CONVERTED = {
    "a Gemm with a scale": (
        [node("Gemm", ["x", "W"], "y", alpha=2.0)], ROWS_IN, lambda x, w, o: 2 * x @ w
    ),
    "a factor for each input": (
        [node("Transpose", ["W"], "t", perm=[1, 0]), node("Mul", ["t", "row"], "f"),
         node("Transpose", ["f"], "u", perm=[1, 0]), node("MatMul", ["x", "u"], "y")],
        ROWS_IN,
        lambda x, w, o: x @ (w.T * o["row"]).T,
    ),
    "blocks along the outputs": (
        [node("Transpose", ["x"], "t", perm=[1, 0]), node("MatMul", ["W", "t"], "u"),
         node("Transpose", ["u"], "y", perm=[1, 0])],
        ROWS_OUT,
        lambda x, w, o: x @ w,
    ),
    "two products": (
        [node("MatMul", ["x", "W"], "p"), node("MatMul", ["x", "W"], "q"),
         node("Mul", ["p", "q"], "y")],
        ROWS_IN,
        lambda x, w, o: (x @ w) ** 2,
    ),
    "a sum": ([node("Add", ["x", "W"], "y")], ROWS_OUT, lambda x, w, o: x + w.T),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("case", PACKED)
def test_products_are_computed_from_packed_numbers(case, dtype, tmp_path):
    nodes, shape, expected = PACKED[case]
    proto, matrix, others = graph_of(nodes, shape=shape, dtype=dtype)
    x = np.random.default_rng(1).standard_normal((5, NUM_INPUTS)).astype(np.float32)

    output, shares = run(proto, tmp_path, x)

    np.testing.assert_allclose(output, expected(x, matrix, others), rtol=1e-4, atol=1e-4)
    assert shares.as_stored == SIZE
    assert (shares.converted_once, shares.converted_in_every_run) == (0, 0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("case", CONVERTED)
def test_all_else_is_converted_once(case, dtype, tmp_path):
    nodes, shape, expected = CONVERTED[case]
    proto, matrix, others = graph_of(nodes, shape=shape, dtype=dtype)
    x = np.random.default_rng(1).standard_normal(ROWS_OUT).astype(np.float32)

    output, shares = run(proto, tmp_path, x)

    np.testing.assert_allclose(output, expected(x, matrix, others), rtol=1e-4, atol=1e-4)
    assert (shares.as_stored, shares.converted_once) == (0, SIZE)
    assert shares.converted_in_every_run == 0


def test_a_matrix_may_be_used_in_both_ways(tmp_path):
    nodes = [node("MatMul", ["x", "W"], "p"), node("ReduceSum", ["W"], "q"),
             node("Add", ["p", "q"], "y")]  # fmt: skip
    proto, matrix, _ = graph_of(nodes)
    x = np.random.default_rng(1).standard_normal((5, NUM_INPUTS)).astype(np.float32)

    output, shares = run(proto, tmp_path, x)

    np.testing.assert_allclose(output, x @ matrix + matrix.sum(), rtol=1e-4, atol=1e-4)
    assert (shares.as_stored, shares.converted_in_every_run) == (SIZE, 0)


def test_what_comes_between_the_conversion_and_the_product_is_seen(tmp_path):
    proto, matrix, _ = graph_of([node("MatMul", ["x", "W"], "y")])
    (product,) = [each for each in proto.graph.node if each.op_type == "MatMul"]
    between = node("Clip", [product.input[1]], "between")
    proto.graph.node.insert(list(proto.graph.node).index(product), between)
    product.input[1] = "between"
    x = np.random.default_rng(1).standard_normal((5, NUM_INPUTS)).astype(np.float32)

    output, shares = run(proto, tmp_path, x)

    np.testing.assert_allclose(output, x @ matrix, rtol=1e-4, atol=1e-4)
    assert shares.as_stored == 0
    assert shares.converted_in_every_run == SIZE
