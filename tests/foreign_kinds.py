"""Small foreign models of several kinds, in ONNX's text form, and what they compute."""

import numpy as np
import onnx
from builders import tiny_frames, tiny_schema
from foreign_models import dequantised, parsed_model, run_original
from onnx import TensorProto, helper, numpy_helper

from ensemble_kit.data.dataset import Batch
from ensemble_kit.data.labels import LabelLists

WIDTH, CLASSES = 4, 3
SCHEMA = tiny_schema(widths={"rgb": WIDTH, "audio": 2}, num_classes=CLASSES, value_type="uint8")
HEAD = """
   h = MatMul (pooled, w)
   p = Sigmoid (h)
"""
# The mean of a video's frames, which lie in x (b, t, 4), of which n count.
MEAN = """
   one = Constant <value_ints = [1]> ()
   sum = ReduceSum <keepdims = 0> (x, one)
   counts = Cast <to = 1> (n)
   column = Unsqueeze (counts, one)
   pooled = Div (sum, column)
"""
TRANSPOSED = "x = Transpose <perm = [0, 2, 1]> (xt)\n" + MEAN + HEAD
LAST_FRAME = """
   shape = Shape <start = 1, end = 2> (x)
   zero = Constant <value_ints = [0]> ()
   one = Constant <value_ints = [1]> ()
   two = Constant <value_ints = [2]> ()
   steps = Slice (table, zero, shape, zero)
   counts = Cast <to = 1> (n)
   unit = Constant <value_float = 1.0> ()
   last = Sub (counts, unit)
   column = Unsqueeze (last, one)
   equal = Equal (steps, column)
   mask = Cast <to = 1> (equal)
   mask3 = Unsqueeze (mask, two)
   xm = Mul (x, mask3)
   pooled = ReduceSum <keepdims = 0> (xm, one)
"""


def weights(seed=0):
    matrix = np.random.default_rng(seed).standard_normal((WIDTH, CLASSES))
    return {"w": matrix.astype(np.float32)}


def batch_of(counts, rng, schema=SCHEMA):
    frames, num_frames = tiny_frames(schema, counts, rng)
    arrays = {name: values.numpy() for name, values in frames.items()}
    ids = tuple(map(str, range(len(counts))))
    return Batch(ids, arrays, num_frames.numpy(), LabelLists.from_lists([]))


def classical_model(path, *, has_zipmap, kind="linear"):
    """Write what scikit-learn's and LightGBM's converters write: labels, and probabilities."""
    if kind == "linear":
        attributes = {
            "classlabels_ints": list(range(CLASSES)),
            "coefficients": weights()["w"].T.ravel().tolist(),
            "intercepts": [0.0] * CLASSES,
            "post_transform": "LOGISTIC",
        }
        node = helper.make_node(
            "LinearClassifier", ["pooled"], ["lab", "raw"], domain="ai.onnx.ml", **attributes
        )
    else:  # a tree for each class: one split on its feature
        tree = {"nodes_treeids": [], "nodes_nodeids": [], "nodes_featureids": [],
                "nodes_values": [], "nodes_modes": [], "nodes_truenodeids": [],
                "nodes_falsenodeids": [], "class_treeids": [], "class_nodeids": [],
                "class_ids": [], "class_weights": []}  # fmt: skip
        for index in range(CLASSES):
            tree["nodes_treeids"] += [index] * 3
            tree["nodes_nodeids"] += [0, 1, 2]
            tree["nodes_featureids"] += [index, 0, 0]
            tree["nodes_values"] += [0.0, 0.0, 0.0]
            tree["nodes_modes"] += ["BRANCH_LEQ", "LEAF", "LEAF"]
            tree["nodes_truenodeids"] += [1, 0, 0]
            tree["nodes_falsenodeids"] += [2, 0, 0]
            tree["class_treeids"] += [index] * 2
            tree["class_nodeids"] += [1, 2]
            tree["class_ids"] += [index] * 2
            tree["class_weights"] += [-1.0, 1.0 + index]
        node = helper.make_node(
            "TreeEnsembleClassifier", ["pooled"], ["lab", "raw"], domain="ai.onnx.ml",
            classlabels_int64s=list(range(CLASSES)), post_transform="LOGISTIC", **tree,
        )  # fmt: skip
    base = parsed_model(f"float[b, t, {WIDTH}] x, int64[b] n", MEAN, {}, 17, "float[b, 4] pooled")
    nodes = [*base.graph.node, node]
    label = helper.make_tensor_value_info("lab", TensorProto.INT64, ["b"])
    probabilities = helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["b", CLASSES])
    if has_zipmap:
        nodes.append(
            helper.make_node(
                "ZipMap", ["raw"], ["zm"], domain="ai.onnx.ml",
                classlabels_int64s=list(range(CLASSES)),
            )
        )  # fmt: skip
        rows = helper.make_map_type_proto(
            TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        )
        probabilities = helper.make_value_info("zm", helper.make_sequence_type_proto(rows))
    graph = helper.make_graph(nodes, "g", base.graph.input, [label, probabilities])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def labelwise_model(path, form, *, columns=2):
    """Write what scikit-learn's converter writes for several labels: each label's no and yes.

    Args:
        path: The file.
        form: ``tensor`` for one ``(C, B, 2)``, ``zipmap`` for that in a ZipMap, or ``sequence`` of
            C matrices ``(B, 2)``.
        columns: How many classes each label has.
    """
    model = onnx.load(classical_model(path, has_zipmap=False))
    parts = [f"part{index}" for index in range(CLASSES)]
    constants = [numpy_helper.from_array(np.float32(1), "one_")]
    nodes = []
    for index, part in enumerate(parts):
        constants.append(numpy_helper.from_array(np.array([index]), f"{part}_index"))
        nodes += [
            helper.make_node("Gather", ["raw", f"{part}_index"], [f"{part}_yes"], axis=1),
            helper.make_node("Sub", ["one_", f"{part}_yes"], [f"{part}_no"]),
            helper.make_node(
                "Concat", [f"{part}_no"] * (columns - 1) + [f"{part}_yes"], [part], axis=1
            ),
        ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [CLASSES, "b", columns])
    if form == "sequence":
        nodes.append(helper.make_node("SequenceConstruct", parts, ["out"]))
        matrix = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        output = helper.make_value_info("out", helper.make_sequence_type_proto(matrix))
    else:
        constants.append(numpy_helper.from_array(np.array([0]), "axis"))
        nodes += [helper.make_node("Unsqueeze", [part, "axis"], [f"{part}_3d"]) for part in parts]
        joined = "out" if form == "tensor" else "joined"
        nodes.append(helper.make_node("Concat", [f"{part}_3d" for part in parts], [joined], axis=0))
    if form == "zipmap":
        nodes.append(
            helper.make_node(
                "ZipMap", ["joined"], ["out"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]
            )
        )
        rows = helper.make_map_type_proto(
            TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        )
        output = helper.make_value_info("out", helper.make_sequence_type_proto(rows))
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    del model.graph.output[1:]
    model.graph.output.append(output)
    onnx.save(model, path)
    return path


def originals(path, batch):
    """Return what the original says of each video alone."""
    return [
        run_original(
            path,
            {
                "x": dequantised(batch.frames["rgb"][[row], :count]),
                "n": np.array([count], np.int64),
            },
        )[0]
        for row, count in enumerate(batch.num_frames)
    ]
