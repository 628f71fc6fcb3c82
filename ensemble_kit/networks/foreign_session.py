"""Run foreign graphs in ONNX Runtime, with weights that stay where they are in memory."""

from collections.abc import Mapping
from math import prod

import onnx
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor

from ensemble_kit.errors import ForeignModelError
from ensemble_kit.serving.opening import open_session
from ensemble_kit.store.dtypes import BY_ONNX
from ensemble_kit.wording import counted

MAX_REASON = 500  # characters of ONNX Runtime's message that are worth reading


def open_foreign(
    graph: onnx.ModelProto, weights: Mapping[str, Tensor], device: str, name: str
) -> onnxruntime.InferenceSession:
    """Open a graph whose weights are inputs of it.

    Args:
        graph: The graph.
        weights: The weights by the names of their inputs; the session does not copy them.
        device: ``cpu`` or ``cuda``.
        name: What errors call the model.

    Raises:
        ProviderError: ONNX Runtime cannot open it, or not on that device.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    del model.graph.input[:]
    model.graph.input.extend(value for value in graph.graph.input if value.name not in weights)
    for value in graph.graph.input:
        if value.name in weights:
            model.graph.initializer.append(_held_elsewhere(value))
    options = onnxruntime.SessionOptions()
    if weights:
        values = [_ort_value(tensor) for tensor in weights.values()]
        options.add_external_initializers(list(weights), values)
    return open_session(
        model.SerializeToString(),
        device="cuda" if device == "cuda" else "cpu",
        name=f"the graph of {name}",
        hint="Import the model again from its ONNX file.",
        options=options,
    )


def run_foreign(
    session: onnxruntime.InferenceSession,
    feed: Mapping[str, Tensor],
    output: str,
    *,
    name: str,
    size: tuple[int, int],
    hint: str,
) -> Tensor:
    """Run a graph and return one output.

    Args:
        session: The graph in a session.
        feed: A tensor for each input.
        output: The name of the output.
        name: What errors call the model.
        size: The number of videos, and of frames of the longest one, for errors.
        hint: What the user should do if the graph cannot be run on them.

    Raises:
        ForeignModelError: ONNX Runtime cannot run the graph on these values.
    """
    try:
        if any(values.dtype == torch.bfloat16 for values in feed.values()):
            fed = {key: _ort_value(values) for key, values in feed.items()}
            (found,) = [each.numpy() for each in session.run_with_ort_values([output], fed)]
        else:
            arrays = {key: values.cpu().numpy() for key, values in feed.items()}
            (found,) = session.run([output], arrays)
        return torch.from_numpy(found)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        videos, frames = size
        reason = " ".join(str(error).split()).rstrip(".")[:MAX_REASON]
        raise ForeignModelError(
            f"{name}: ONNX Runtime cannot run it on {counted(videos, 'video')} of "
            f"{counted(frames, 'frame')}: {reason}.",
            hint=hint,
        ) from error


def _held_elsewhere(value: onnx.ValueInfoProto) -> TensorProto:
    """Return an initialiser whose values ONNX Runtime finds by its name."""
    tensor = value.type.tensor_type
    shape = [each.dim_value for each in tensor.shape.dim]
    held = TensorProto(
        name=value.name,
        data_type=tensor.elem_type,
        dims=shape,
        data_location=TensorProto.EXTERNAL,
    )
    size = prod(shape) * BY_ONNX[tensor.elem_type].num_bytes
    for key, text in (("location", "_"), ("offset", "0"), ("length", str(size))):
        held.external_data.add(key=key, value=text)
    return held


def _ort_value(tensor: Tensor) -> onnxruntime.OrtValue:
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
