"""ONNX files of other frameworks, made ready to be members.

A graph is reduced to one output, raised to the kit's operator set, and separated from its weights,
which become inputs of it. Some tensors stay in the graph and are never rounded, whatever precision
the member is stored in: integers and single numbers, because shapes are computed from them; scales
of quantised or resized values, which operators want as constants; and floating-point tables of
whole or evenly spaced numbers, such as positions 0 to 299 or 0 to 149.5 in halves. bfloat16 has 8
significant bits, so that 257 would become 256, and a graph that compares positions with counts
would read another frame.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from numpy.typing import NDArray
from onnxscript import version_converter
from torch import Tensor

from ensemble_kit.errors import ForeignModelError
from ensemble_kit.foreign.outputs import CLASSICAL, expose_tensors, keep_output
from ensemble_kit.networks.foreign_session import MAX_REASON
from ensemble_kit.networks.storage import torch_type
from ensemble_kit.serving.onnx_file import read_tensors, values_path
from ensemble_kit.store.dtypes import BY_ONNX, STORAGE_TYPES

WEIGHT_TYPES = frozenset(
    ir.DataType(each.onnx_number) for each in STORAGE_TYPES if each.is_floating
)
ONNX_DOMAINS = frozenset({"", "ai.onnx", CLASSICAL})
# Operators and the first of their inputs that are constants of arithmetic rather than weights.
CONSTANT_INPUTS = {
    "DequantizeLinear": 1,
    "OneHot": 2,
    "Pad": 2,
    "QLinearConv": 1,
    "QLinearMatMul": 1,
    "QuantizeLinear": 1,
    "Resize": 1,
    "Upsample": 1,
}
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
FEWEST_STEPS = 8  # numbers; fewer may be evenly spaced by chance
FIRST_VALUES = 4096  # these distinguish most weights from a table of whole numbers


class Foreign(NamedTuple):
    """A foreign model that was read.

    Attributes:
        graph: The graph without its weights, which are its last inputs.
        inputs: The names of the other inputs.
        weights: The weights by name; their values may still be in a file.
        original: The file's model with the same outputs, serialised, to compare the graph with.
        output: The name of the output that was kept.
        sha256: The hash of the bytes that were read.
        folder: The folder of the files that hold values, after links.
    """

    graph: onnx.ModelProto
    inputs: tuple[str, ...]
    weights: Mapping[str, ir.TensorProtocol]
    original: bytes
    output: str
    sha256: str
    folder: Path

    def tensor(self, name: str) -> Tensor:
        """Return a copy of a weight in memory."""
        held = self.weights[name]
        dtype = torch_type(BY_ONNX[held.dtype])
        data = np.frombuffer(held.tobytes(), np.uint8).copy()
        return torch.from_numpy(data).view(dtype).reshape(held.shape.numpy())


def read_foreign(path: Path, *, output: str | None, opset: int) -> Foreign:
    """Read an ONNX file that another framework wrote.

    Args:
        path: The file; values that lie in other files are read from its own folder only.
        output: The output to keep, and what leads to it; None where there is only one.
        opset: The version of ONNX's operators that its graph is raised to, if it is older.

    Raises:
        ExportError: The file is not whole, or its values lie outside of its folder.
        ForeignModelError: It cannot be raised to the opset, has no such output, or has operators
            that are not ONNX's own, draw random numbers or run in training mode.
        Exception: It is no ONNX model; protobuf, onnx_ir and NumPy raise errors of many classes.
    """
    read_tensors(path)  # the file is whole, and nothing lies outside of its folder
    data = path.read_bytes()
    with _quiet():
        proto = onnx.ModelProto.FromString(data)
        names = [value.name for value in proto.graph.output]
        is_changed = expose_tensors(proto)
        folder = _follow_links(proto, path)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, folder)
        _allow_hard_links(model, folder)
        passes.InlinePass()(model)
        passes.RemoveInitializersFromInputsPass()(model)
        kept = keep_output(model, output, path, names)
        _refuse_operators(model, path)
        _raise_opset(model, opset, path)
        passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=2)(model)
        passes.LiftSubgraphInitializersToMainGraphPass()(model)
        passes.ClearMetadataAndDocStringPass()(model)
    graph, inputs, weights = _part(model)
    original = proto.SerializeToString() if is_changed or folder != path.parent else data
    digest = hashlib.sha256(data).hexdigest()
    return Foreign(graph, inputs, weights, original, kept, digest, folder)


def _follow_links(proto: onnx.ModelProto, path: Path) -> Path:
    """Let symbolic links stand for files of weights, as in the cache of the Hugging Face Hub.

    onnx_ir, and ONNX Runtime where it is given bytes, refuse a link out of the folder. A person has
    named this folder, and ``read_tensors`` has made sure that the files are in it by name, which is
    all that ONNX Runtime asks of a file that it opens itself.

    Returns:
        The folder that the files lie in; if that is another one, the model now names them there.
    """
    entries = [
        entry
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    folder = path.parent
    files = [values_path(path, entry.value).resolve() for entry in entries]
    folders = {file.parent for file in files}
    if len(folders) != 1 or folders == {folder.resolve()}:
        return folder
    for entry, file in zip(entries, files, strict=True):
        entry.value = file.name
    return folders.pop()


def _allow_hard_links(model: ir.Model, folder: Path) -> None:
    """Let weights lie in files of several names, as some caches keep them; onnx_ir refuses those.

    Without a base folder it looks at no link; what lies where ``read_tensors`` has not looked, as
    in a constant or a branch, keeps its base folder.
    """
    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor) and Path(held.location).name == held.location:
            value.const_value = ir.ExternalTensor(
                location=folder.absolute() / held.location,
                offset=held.offset,
                length=held.length,
                dtype=held.dtype,
                shape=held.shape,
                name=str(held.name),
            )


def root_of(error: BaseException) -> str:
    """Return the message of the error that caused all others, cut to a readable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".")[:MAX_REASON]
    return text or type(error).__name__


def _refuse_operators(model: ir.Model, path: Path) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ONNX_DOMAINS:
            raise ForeignModelError(
                f"{path} uses {node.op_type} of {node.domain}, which is not an operator of ONNX.",
                hint="Export the model again with ONNX's own operators only.",
            )
        if node.op_type in RANDOM:
            raise ForeignModelError(
                f"{path} draws new random numbers in each run ({node.op_type}).",
                hint="Export the model in its evaluation mode.",
            )
        if _is_training(node):
            raise ForeignModelError(
                f"{path} has {node.op_type} in training mode, so that a video's probabilities "
                "depend on the other videos of its batch.",
                hint="Export the model in its evaluation mode.",
            )
    version = max(model.opset_imports.get(domain, 1) for domain in ("", "ai.onnx"))
    classical = model.opset_imports.get(CLASSICAL)
    model.opset_imports.clear()
    model.opset_imports[""] = version
    if classical is not None and any(node.domain == CLASSICAL for node in model.graph):
        model.opset_imports[CLASSICAL] = classical


def _is_training(node: ir.Node) -> bool:
    """Return whether a batch norm uses the statistics of the batch, or a dropout drops numbers."""
    if node.op_type == "BatchNormalization":
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        return bool(node.attributes.get_int("training_mode", 0)) or len(used) > 1
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        mode = ir.convenience.get_const_tensor(node.inputs[2])
        return mode is None or bool(mode.numpy())
    return False


def _raise_opset(model: ir.Model, opset: int, path: Path) -> None:
    found = model.opset_imports[""]
    if found >= opset:
        return
    try:
        version_converter.convert_version(model, opset, fallback=True)
        is_raised = model.opset_imports.get("") == opset
    except Exception:  # the converters' exceptions have no common class
        is_raised = False
    if not is_raised:
        raise ForeignModelError(
            f"{path} uses opset {found}, which cannot be raised to {opset}.",
            hint=f"Export the model again with opset {opset}.",
        )


def _part(
    model: ir.Model,
) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, ir.TensorProtocol]]:
    """Turn a graph's weights into inputs, and remove the shapes that were inferred in between."""
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    weights = {}
    for name, value in list(model.graph.initializers.items()):
        held = value.const_value
        assert held is not None
        if _is_weight(value, held):
            del model.graph.initializers[name]
            value.const_value = None
            value.shape, value.type = ir.Shape(held.shape.numpy()), ir.TensorType(held.dtype)
            model.graph.inputs.append(value)
            weights[name] = held
        elif isinstance(held, ir.ExternalTensor):  # the graph is kept without the other file
            value.const_value = ir.Tensor(held.numpy().copy(), dtype=held.dtype, name=name)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for result in node.outputs:
            if not result.is_graph_output():
                result.shape, result.type = None, None
    return ir.to_proto(model), inputs, weights


def _is_weight(value: ir.Value, held: ir.TensorProtocol) -> bool:
    """Return whether a tensor is stored beside the graph, in the precision of its member."""
    if held.dtype not in WEIGHT_TYPES or held.size <= 1:
        return False
    for node, index in value.uses():
        if index >= CONSTANT_INPUTS.get(node.op_type, index + 1):
            return False
    return not _is_table(held.numpy())


def _is_table(values: NDArray[Any]) -> bool:
    """Return whether a tensor holds different whole numbers only, or evenly spaced ones.

    Trained weights never do. A bias or scale that was never trained holds one number throughout.
    """
    flat = values.reshape(-1)
    if _is_evenly_spaced(flat):
        return True
    for part in (flat[:FIRST_VALUES], flat):
        numbers = part.astype(np.float64)
        if not np.isfinite(numbers).all() or (numbers != np.rint(numbers)).any():
            return False
    return bool((flat != flat[0]).any())


def _is_evenly_spaced(flat: NDArray[Any]) -> bool:
    """Return whether numbers rise or fall by one step, but for the rounding of their type."""
    if flat.dtype not in (np.float32, np.float64) or not FEWEST_STEPS <= flat.size <= FIRST_VALUES:
        return False
    numbers = flat.astype(np.float64)
    if not np.isfinite(numbers).all():
        return False
    step = (numbers[-1] - numbers[0]) / (numbers.size - 1)
    slack = 2 * float(np.finfo(flat.dtype).eps) * float(np.abs(numbers).max())
    exact = numbers[0] + step * np.arange(numbers.size)
    return abs(step) > 2 * slack and bool((np.abs(numbers - exact) <= slack).all())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converters' notes to their own developers away from the user's terminal."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
