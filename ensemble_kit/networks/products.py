"""Which of a model's matrices are those of products, and which dimension counts their outputs."""

import onnx
import onnx_ir as ir
from torch import nn

from ensemble_kit.networks.building import empty_model
from ensemble_kit.networks.foreign import WEIGHTS
from ensemble_kit.networks.loading import empty_foreign, member_file_metadata
from ensemble_kit.recipes.reading import parse_recipe
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.tensor_files import TensorFile


def _graph_axes(graph: onnx.ModelProto) -> dict[str, int]:
    """Return the matrices of products by name, and which dimension counts a matrix's outputs.

    Args:
        graph: A graph whose weights are inputs of it.
    """
    inputs = ir.from_proto(graph).graph.inputs
    found = {
        str(value.name): _output_axis(value)
        for value in inputs
        if value.shape is not None and value.shape.rank() == 2
    }
    return {name: axis for name, axis in found.items() if axis is not None}


def _output_axis(value: ir.Value) -> int | None:
    """Return the dimension of a matrix that counts the outputs of a product it goes into."""
    for node, index in value.uses():
        if node.op_type == "MatMul":
            return 1 if index == 1 else 0
        if node.op_type == "Gemm" and index < 2:
            transposed = node.attributes.get_int(("transA", "transB")[index], 0)
            return int(index != transposed)
        if node.op_type in {"Cast", "Identity", "Transpose"}:
            axis = _output_axis(node.outputs[0])
            if axis is not None:
                return 1 - axis if node.op_type == "Transpose" else axis
    return None


def output_axes(model: nn.Module) -> dict[str, int]:
    """Return the matrices of products by name, and which dimension counts a matrix's outputs.

    PyTorch's own layers have outputs by inputs, ``x W^T``; all others are taken to be ``x W``, but
    for the matrices that a layer names in ``not_products``.
    """
    return {
        f"{prefix}.{name}" if prefix else name: axis
        for prefix, module in model.named_modules()
        for axis in [0 if isinstance(module, nn.Linear | nn.RNNBase) else 1]
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2 and name not in getattr(module, "not_products", ())
    }


def product_axes(file: TensorFile) -> dict[str, int]:
    """Return the matrices of products in an open checkpoint or foreign model, by tensor.

    The numbers are the dimensions that count their outputs, as in ``output_axes``.
    """
    metadata = member_file_metadata(file)
    if isinstance(metadata, CheckpointMetadata):
        return output_axes(empty_model(parse_recipe(metadata.recipe), metadata.data_schema))
    model = empty_foreign(file, metadata.mapping, metadata.data_schema, name=metadata.name)
    axes = _graph_axes(model.graph)
    return {WEIGHTS + name: axes[name] for name in model.weight_specs if name in axes}
