"""Small ONNX models as other frameworks would have written them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WIDTH, HIDDEN, CLASSES = 7, 700, 6  # rgb's width and the classes of the tests' workspace
INPUTS = {
    "pixels": (TensorProto.FLOAT, ["n", "t", WIDTH]),
    "lengths": (TensorProto.INT64, ["n"]),
}
FLOATS = {np.dtype("float16"): TensorProto.FLOAT16, np.dtype("float64"): TensorProto.DOUBLE}


def foreign_weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return the weights of ``foreign_model``: two matrices large enough for int8, two biases."""
    random = np.random.default_rng(seed)
    shapes = {
        "fc1/w": (WIDTH, HIDDEN),
        "fc1/b": (HIDDEN,),
        "fc2/w": (CLASSES, HIDDEN),
        "fc2/b": (CLASSES,),
    }
    return {
        name: (random.standard_normal(shape) * 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def foreign_model(
    *,
    opset: int = 11,
    inputs: dict[str, tuple[int, list[Any]]] | None = None,
    weights: dict[str, NDArray[Any]] | None = None,
    extra: Sequence[onnx.NodeProto] = (),
    outputs: Sequence[str] = ("scores",),
    weights_are_inputs: bool = False,
) -> onnx.ModelProto:
    """Return logits of two dense layers over the mean of a video's frames, ``(n, 6)``.

    Args:
        opset: 11 or 12, whose sums have their axes as attributes, as no later opset's have.
        inputs: Types and dimensions of other inputs.
        weights: Others than ``foreign_weights``.
        extra: Nodes to put after the others.
        outputs: The names of its outputs.
        weights_are_inputs: Whether weights are inputs with defaults, as old exporters had them.
    """
    weights = foreign_weights() if weights is None else weights
    nodes = [
        helper.make_node("ReduceSum", ["pixels"], ["sum"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["lengths"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["count"], ["counts"], axes=[1]),
        helper.make_node("Div", ["sum", "counts"], ["mean"], name="mean"),
        helper.make_node("MatMul", ["mean", "fc1/w"], ["h1"], name="fc1/MatMul"),
        helper.make_node("Add", ["h1", "fc1/b"], ["h2"], name="fc1/Add"),
        helper.make_node("Relu", ["h2"], ["h3"]),
        helper.make_node("Gemm", ["h3", "fc2/w", "fc2/b"], ["scores"], transB=1, name="fc2"),
        *extra,
    ]
    values = {**INPUTS, **(inputs or {})}
    declared = [helper.make_tensor_value_info(name, *value) for name, value in values.items()]
    if weights_are_inputs:
        declared += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
            for name, array in weights.items()
        ]
    graph = helper.make_graph(
        nodes,
        "elsewhere",
        declared,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="elsewhere")


def write_foreign(path: Path, **options: Any) -> Path:
    """Write ``foreign_model`` and return its path."""
    path.write_bytes(foreign_model(**options).SerializeToString())
    return path


def write_torch_model(path: Path, *, width: int = 10, length: int = 9) -> Path:
    """Write a recurrent tagger as torch.onnx exports a plain module.

    It reads ``length`` raw frames of all modalities side by side and a mask of padding, and returns
    what a softmax has made of six classes.
    """
    import torch
    from torch import Tensor, nn

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(width, 5, batch_first=True)
            self.head = nn.Linear(5, CLASSES)

        def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
            states, _ = self.gru(frames.float() / 255.0)
            weights = mask.float().unsqueeze(-1)
            pooled = (states * weights).sum(1) / weights.sum(1)
            return self.head(pooled).softmax(-1)

    torch.manual_seed(3)
    frames = torch.zeros(2, length, width, dtype=torch.uint8)
    mask = torch.ones(2, length, dtype=torch.bool)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        torch.onnx.export(
            Tagger().eval(),
            (frames, mask),
            path,
            dynamo=True,
            dynamic_shapes=({0: batch}, {0: batch}),
            input_names=["frames", "mask"],
            output_names=["tags"],
            external_data=False,
            verbose=False,
        )
    return path


def run_original(path: Path, feed: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the first output of an ONNX file as ONNX Runtime computes it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    output: NDArray[Any] = session.run(None, feed)[0]
    return output


def dequantised(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the features that bytes stand for, as the starter code of YouTube-8M has it."""
    return (stored * (4 / 255) + (4 / 512 - 2)).astype(np.float32)


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return probabilities in float64."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def foreign_probabilities(path: Path, frames: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what ``foreign_model`` says of one video without padding, ``(T, 7)``."""
    feed = {"pixels": frames[np.newaxis], "lengths": np.array([len(frames)], np.int64)}
    return sigmoid(run_original(path, feed)[0])


def torch_probabilities(path: Path, joint: NDArray[np.uint8], *, length: int = 9) -> NDArray[Any]:
    """Return what ``write_torch_model``'s says of one video without padding, ``(T, 10)``."""
    frames, mask = np.zeros((1, length, joint.shape[1]), np.uint8), np.zeros((1, length), bool)
    frames[0, : len(joint)] = joint[:length]
    mask[0, : len(joint)] = True
    return run_original(path, {"frames": frames, "mask": mask})[0]


def parsed_model(
    inputs: str,
    body: str,
    values: dict[str, NDArray[Any]],
    opset: int,
    output: str,
    extra_opsets: str = "",
) -> onnx.ModelProto:
    """Return a model written in ONNX's text form.

    Args:
        inputs: Such as ``float[b, t, 4] x, int64[b] n``.
        body: The nodes, one a line.
        values: The initialisers.
        opset: The version of ONNX's operators.
        output: Such as ``float[b, 3] p``.
        extra_opsets: Such as ``, "ai.onnx.ml" : 3``.
    """
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}{extra_opsets}]>\n'
        f"elsewhere ({inputs}) => ({output}) {{\n{body}\n}}"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in values.items()
    )
    return model
