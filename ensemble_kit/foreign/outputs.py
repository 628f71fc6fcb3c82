"""The outputs of foreign models: which there are, and the one with a number for each class."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx import TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes

from ensemble_kit.errors import ForeignModelError
from ensemble_kit.store.dtypes import STORAGE_TYPES

CLASSICAL = "ai.onnx.ml"  # ONNX's own operators for trees, linear models and the like
FLOATS = frozenset(ir.DataType(each.onnx_number) for each in STORAGE_TYPES if each.is_floating)


def expose_tensors(model: onnx.ModelProto) -> bool:
    """Make every output of a model a tensor, and every dimension of unknown size free.

    scikit-learn's converter ends a classifier with ZipMap, which turns each row of probabilities
    into a dictionary. Its output becomes the tensor that ZipMap reads, under the same name. Where a
    classifier of C labels gives each label's probabilities of no and of yes, its output becomes
    those of yes, ``(B, C)``. Other outputs that are not tensors are left out. Paddle writes -1 for
    the size of a free dimension.

    Returns:
        Whether anything was changed.
    """
    graph = model.graph
    before = graph.ByteSize()
    for node in graph.node:
        if node.op_type == "ZipMap":
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:]
            for value in graph.output:
                if value.name in node.output:
                    _make_tensor(value)
    if any(node.domain == CLASSICAL for node in graph.node):
        _take_yes(model)
    kept = [value for value in graph.output if value.type.WhichOneof("value") == "tensor_type"]
    if len(kept) < len(graph.output):
        del graph.output[:]
        graph.output.extend(kept)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_value") and size.dim_value < 1:
                size.ClearField("dim_value")
    return bool(graph.ByteSize() != before)


def _make_tensor(value: onnx.ValueInfoProto) -> None:
    value.type.CopyFrom(onnx.TypeProto())
    value.type.tensor_type.elem_type = TensorProto.FLOAT


def _take_yes(model: onnx.ModelProto) -> None:
    """Make outputs of each label's probabilities of no and of yes those of yes, ``(B, C)``.

    Of several labels, scikit-learn's forests, trees and neighbours give ``(C, B, 2)``, and its
    ``MultiOutputClassifier`` a sequence of C matrices ``(B, 2)``. Their classes are sorted, so that
    the second of two is that of the positives.
    """
    graph, known = model.graph, infer_shapes(model).graph
    sizes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*known.value_info, *known.output)
    }
    sequences = {node.output[0]: node for node in graph.node if node.op_type == "SequenceConstruct"}
    for value in graph.output:
        both, yes, columns = (f"{value.name}/{part}" for part in ("both", "yes", "columns"))
        sequence = sequences.get(value.name)
        if sequence and all(sizes.get(name) == [0, 2] for name in sequence.input):
            numbers = np.arange(1, 2 * len(sequence.input), 2)
            sequence.op_type = "Concat"  # (B, 2 * C)
            sequence.attribute.append(helper.make_attribute("axis", 1))
            added = [helper.make_node("Gather", [both, columns], [value.name], axis=1)]
        elif sizes.get(value.name, [])[1:] == [0, 2] and sizes[value.name][0]:
            numbers = np.array(1)
            added = [
                helper.make_node("Gather", [both, columns], [yes], axis=2),
                helper.make_node("Transpose", [yes], [value.name], perm=[1, 0]),
            ]
        else:
            continue
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [both if name == value.name else name for name in names]
        graph.initializer.append(numpy_helper.from_array(numbers, columns))
        graph.node.extend(added)
        _make_tensor(value)


def keep_output(model: ir.Model, wanted: str | None, path: Path, names: Collection[str]) -> str:
    """Reduce a graph to one output, and what leads to it, and return the output's name.

    Args:
        model: The model; changed in place.
        wanted: The output; None where there is only one.
        path: The file that errors name.
        names: All outputs of the file, those that are no tensors too.

    Raises:
        ForeignModelError: There is no such output, or several, or it does not hold fractions.
    """
    outputs = {str(value.name): value for value in model.graph.outputs}
    listed = ", ".join(outputs)
    if not outputs:
        raise ForeignModelError(
            f"{path} has no output.",
            hint="Export the model again from the framework that made it.",
        )
    if wanted is None and len(outputs) != 1:
        raise ForeignModelError(
            f"{path} has {len(outputs)} outputs: {listed}.",
            hint="Say with --probabilities which of them has a number for each class.",
        )
    if wanted in names and wanted not in outputs:
        raise ForeignModelError(
            f"{path}: its output {wanted} is a list or a dictionary, not a tensor.",
            hint="Export the model with an output that has a number for each class of a video.",
        )
    if wanted is not None and wanted not in outputs:
        raise ForeignModelError(
            f"{path} has no output {wanted!r}; it has {listed}.",
            hint="Name one of them with --probabilities.",
        )
    kept = outputs[wanted] if wanted is not None else model.graph.outputs[0]
    if kept.dtype is not None and kept.dtype not in FLOATS:
        others = [name for name, value in outputs.items() if value.dtype in FLOATS]
        raise ForeignModelError(
            f"{path}: its output {kept.name} holds {kept.dtype.name}, but probabilities are "
            "fractions.",
            hint=f"Use --probabilities with another output: {', '.join(others)}."
            if others
            else "Export the model with an output of probabilities.",
        )
    model.graph.outputs[:] = [kept]
    passes.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses() and value is not kept:
            model.graph.inputs.remove(value)
    return str(kept.name)
