"""The outputs of foreign models: which there are, and the one with a number for each class."""

from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx import TensorProto

from ensemble_kit.errors import ForeignModelError
from ensemble_kit.store.dtypes import STORAGE_TYPES

FLOATS = frozenset(ir.DataType(each.onnx_number) for each in STORAGE_TYPES if each.is_floating)


def expose_tensors(model: onnx.ModelProto) -> bool:
    """Make every output of a model a tensor, and every dimension of unknown size free.

    scikit-learn's converter ends a classifier with ZipMap, which turns each row of probabilities
    into a dictionary. Its output becomes the tensor that ZipMap reads, under the same name. Other
    outputs that are not tensors are left out. Paddle writes -1 for the size of a free dimension.

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
                    value.type.CopyFrom(onnx.TypeProto())
                    value.type.tensor_type.elem_type = TensorProto.FLOAT
    kept = [value for value in graph.output if value.type.WhichOneof("value") == "tensor_type"]
    if len(kept) < len(graph.output):
        del graph.output[:]
        graph.output.extend(kept)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_value") and size.dim_value < 1:
                size.ClearField("dim_value")
    return bool(graph.ByteSize() != before)


def keep_output(model: ir.Model, wanted: str | None, path: Path) -> str:
    """Reduce a graph to one output, and what leads to it, and return the output's name.

    Args:
        model: The model; changed in place.
        wanted: The output; None where there is only one.
        path: The file that errors name.

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
