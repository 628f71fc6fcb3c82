"""Weights of a model from the tensors of a file, each of them checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ensemble_kit.choices import Dtype
from ensemble_kit.errors import CheckpointError
from ensemble_kit.networks.blocks import fits_blocks
from ensemble_kit.networks.foreign import WEIGHTS, ForeignModel
from ensemble_kit.networks.storage import Stored, is_finite
from ensemble_kit.store.blocks import FORMATS, SCALE, SCALE_TYPE, unpack
from ensemble_kit.store.dtypes import BLOCKS_BY_SAFETENSORS, FLOATING, types_of_weights
from ensemble_kit.store.tensor_files import TensorFile, TensorSpec


class Tensors(Protocol):
    """Tensors by name: those of an open file, or those computed from several files."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The type and shape of every tensor."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, in the type that its spec names."""


def foreign_weights(
    model: ForeignModel, tensors: Tensors, *, prefix: str = "", path: Path
) -> dict[str, Tensor]:
    """Return a foreign model's weights in the types that its graph expects."""
    return {
        name: read_weight(tensors, prefix + WEIGHTS + name, shape, path=path).to(dtype)
        for name, (dtype, shape) in model.weight_specs.items()
    }


def fill(model: torch.nn.Module, file: Tensors, *, prefix: str, path: Path) -> None:
    """Give a model that was built on the meta device its tensors, floating ones in float32.

    Raises:
        CheckpointError: A tensor is missing, has another shape or type, or holds NaN or infinity.
    """
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        state[name] = read_weight(file, prefix + name, tuple(empty.shape), path=path)
        if state[name].dtype != empty.dtype:
            wanted = str(empty.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path}: tensor {prefix + name} holds {file.specs[prefix + name].dtype}; its "
                f"recipe needs numbers that are read as {wanted}.",
                hint="Write the file again with this version of ensemble-kit.",
            )
    model.load_state_dict(state, assign=True)


def read_weight(file: Tensors, name: str, shape: tuple[int, ...], *, path: Path) -> Tensor:
    """Return a tensor of a file, in float32 if it is floating point or in blocks.

    Raises:
        CheckpointError: It is missing, has another shape, or holds NaN or infinity.
    """
    if name in file.specs and name + SCALE in file.specs:
        return read_blocks(file, name, shape, path=path).restored()
    _require_shape(file, name, [shape], path)
    tensor = file.tensor(name)
    if file.specs[name].dtype in FLOATING:
        tensor = tensor.float()
        if not is_finite(tensor):
            raise not_finite(path, name)
    return tensor


def read_blocks(file: Tensors, name: str, shape: tuple[int, ...], *, path: Path) -> Stored:
    """Return a matrix of a file that is stored in blocks.

    Raises:
        CheckpointError: Its tensors are not those of a matrix of that shape, or a scale is
            negative, NaN or infinity.
    """
    type_name, scale_type = (file.specs[each].dtype for each in (name, name + SCALE))
    if type_name not in BLOCKS_BY_SAFETENSORS or scale_type != SCALE_TYPE.safetensors:
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {type_name} with scales in {scale_type}; blocks "
            f"have {' or '.join(BLOCKS_BY_SAFETENSORS)} with {SCALE_TYPE.safetensors}.",
            hint="Write the file again with this version of ensemble-kit.",
        )
    block_format = FORMATS[BLOCKS_BY_SAFETENSORS[type_name]]
    _require_shape(file, name, [block_format.packed_shape(shape)], path)
    shapes = [block_format.scales_shape(shape, axis) for axis in (1, 0)] if len(shape) == 2 else []
    _require_shape(file, name + SCALE, shapes, path)
    packed, scales = file.tensor(name), file.tensor(name + SCALE)
    if not bool(((scales >= 0) & scales.isfinite()).all()):
        raise CheckpointError(
            f"{path}: tensor {name + SCALE} holds a scale that is negative, NaN or infinity.",
            hint="Write the file again with this version of ensemble-kit.",
        )
    return Stored(torch.from_numpy(unpack(packed.numpy(), shape)), scales, block_format)


def _require_shape(file: Tensors, name: str, shapes: Sequence[tuple[int, ...]], path: Path) -> None:
    spec = file.specs.get(name)
    if spec is None or spec.shape not in shapes:
        found = "is missing" if spec is None else f"has shape {spec.shape}"
        needed = " or ".join(map(str, dict.fromkeys(shapes))) or "none"
        raise CheckpointError(
            f"{path}: tensor {name} {found}; the model needs shape {needed}.",
            hint="Write the file again with this version of ensemble-kit.",
        )


def not_finite(path: Path, name: str) -> CheckpointError:
    """Return the error for a file with NaN or infinity in a tensor."""
    return CheckpointError(
        f"{path}: tensor {name} holds NaN or infinity.",
        hint="Use a checkpoint from before the run diverged.",
    )


def count_stored(file: TensorFile) -> int:
    """Return how many numbers a file stores that a fused file stores in its precision."""
    return sum(spec.num_values for spec in file.specs.values() if spec.dtype in FLOATING)


def stored_specs(
    file: TensorFile, axes: Mapping[str, int], dtype: Dtype
) -> dict[str, dict[str, TensorSpec]]:
    """Return what a fused file stores of each tensor, by what follows the tensor's name.

    Args:
        file: A member's checkpoint or foreign model.
        axes: The matrices of its products, from ``product_axes``.
        dtype: The precision.
    """
    return {name: _stored_spec(file, name, axes.get(name), dtype) for name in file.specs}


def _stored_spec(
    file: TensorFile, name: str, output_axis: int | None, dtype: Dtype
) -> dict[str, TensorSpec]:
    spec, block_format = file.specs[name], FORMATS.get(dtype)
    if spec.dtype not in FLOATING:
        return {"": spec}
    types = types_of_weights(dtype)
    if (
        block_format is None
        or output_axis is None
        or not fits_blocks(file.tensor(name), output_axis, block_format)
    ):
        return {"": spec._replace(dtype=types[-1].safetensors)}
    return {
        "": TensorSpec(types[0].safetensors, block_format.packed_shape(spec.shape)),
        SCALE: TensorSpec(
            SCALE_TYPE.safetensors, block_format.scales_shape(spec.shape, output_axis)
        ),
    }
