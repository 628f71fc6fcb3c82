"""ONNX files that another framework wrote, made ready to be members.

Imports ``foreign`` and below. A graph is cut to one output, raised to the kit's opset, and parted
from its weights, which become inputs of it: floating tensors of more than one number. What is
small or whole numbers stays, for shapes and constants of arithmetic are told from it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import version_converter
from torch import Tensor

from ensemble_kit.errors import ForeignModelError
from ensemble_kit.networks.storage import torch_type
from ensemble_kit.serving.onnx_file import read_tensors
from ensemble_kit.store.dtypes import BY_ONNX, STORAGE_TYPES

WEIGHT_TYPES = frozenset(
    ir.DataType(each.onnx_number) for each in STORAGE_TYPES if each.is_floating
)
ONNX_DOMAINS = frozenset({"", "ai.onnx"})
RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


class Foreign(NamedTuple):
    """A model of another framework.

    Attributes:
        graph: Without its weights, which are inputs of it, behind the others.
        inputs: The others' names.
        weights: Where the weights' values are, by name.
    """

    graph: onnx.ModelProto
    inputs: tuple[str, ...]
    weights: Mapping[str, ir.TensorProtocol]

    def tensor(self, name: str) -> Tensor:
        """Return a weight's values, a copy in memory."""
        held = self.weights[name]
        dtype = torch_type(BY_ONNX[held.dtype])
        data = np.frombuffer(held.tobytes(), np.uint8).copy()
        return torch.from_numpy(data).view(dtype).reshape(held.shape.numpy())


def read_foreign(path: Path, *, output: str | None, opset: int) -> Foreign:
    """Read an ONNX file that another framework wrote.

    Args:
        path: The file; values that lie beside it are read from its own folder only.
        output: The output to keep, and what leads to it; None where it has one only.
        opset: The least version of ONNX's operators that its graph is raised to.

    Raises:
        ExportError: The file is not whole, or its values lie outside of its folder.
        ForeignModelError: It cannot be read or raised, has no such output, or has operators that
            are not ONNX's own or draw random numbers.
    """
    read_tensors(path)  # whole, and nothing outside of its folder
    with _quiet():
        try:
            model = ir.load(path)
            passes.InlinePass()(model)
            passes.RemoveInitializersFromInputsPass()(model)
        except Exception as error:  # protobuf's, onnx_ir's and NumPy's have no common class
            raise ForeignModelError(
                f"{path} cannot be read as an ONNX model: {str(error).rstrip('.')}.",
                hint="Export the model again from the framework that made it.",
            ) from error
        _keep_output(model, output, path)
        _refuse_operators(model, path)
        _raise_opset(model, opset, path)
        passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=2)(model)
        passes.LiftSubgraphInitializersToMainGraphPass()(model)
        passes.ClearMetadataAndDocStringPass()(model)
    return _part(model)


def _keep_output(model: ir.Model, wanted: str | None, path: Path) -> None:
    outputs = {str(value.name): value for value in model.graph.outputs}
    listed = ", ".join(outputs)
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
    model.graph.outputs[:] = [kept]
    passes.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses() and value is not kept:
            model.graph.inputs.remove(value)


def _refuse_operators(model: ir.Model, path: Path) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ONNX_DOMAINS:
            raise ForeignModelError(
                f"{path} uses {node.op_type} of {node.domain}, which is not an operator of ONNX.",
                hint="Export the model again with ONNX's own operators only.",
            )
        if node.op_type in RANDOM:
            raise ForeignModelError(
                f"{path} draws random numbers afresh in each run ({node.op_type}).",
                hint="Export the model in its evaluation mode.",
            )
    version = max(model.opset_imports.get(domain, 1) for domain in ONNX_DOMAINS)
    model.opset_imports.clear()
    model.opset_imports[""] = version


def _raise_opset(model: ir.Model, opset: int, path: Path) -> None:
    found = model.opset_imports[""]
    if found >= opset:
        return
    version_converter.convert_version(model, opset, fallback=True)
    if model.opset_imports.get("") != opset:
        raise ForeignModelError(
            f"{path} is of opset {found}, which cannot be raised to {opset}.",
            hint=f"Export the model again with opset {opset}.",
        )


def _part(model: ir.Model) -> Foreign:
    """Make inputs of a graph's weights, and forget what was thought of shapes in between."""
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    weights = {}
    for name, value in list(model.graph.initializers.items()):
        held = value.const_value
        assert held is not None
        if held.dtype in WEIGHT_TYPES and held.size > 1:
            del model.graph.initializers[name]
            value.const_value = None
            value.shape, value.type = ir.Shape(held.shape.numpy()), ir.TensorType(held.dtype)
            model.graph.inputs.append(value)
            weights[name] = held
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None
    return Foreign(ir.to_proto(model), inputs, weights)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converters' notes to their own developers from the user's terminal."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
