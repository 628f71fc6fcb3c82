"""Weights of a model from the tensors of a file, each of them checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ensemble_kit.errors import CheckpointError
from ensemble_kit.networks.foreign import WEIGHTS, ForeignModel
from ensemble_kit.networks.storage import SCALE, Stored, is_finite
from ensemble_kit.store.dtypes import FLOATING
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
                hint="Make the file again with this version of ensemble-kit.",
            )
    model.load_state_dict(state, assign=True)


def read_weight(file: Tensors, name: str, shape: tuple[int, ...], *, path: Path) -> Tensor:
    """Return a tensor of a file, in float32 if it is floating point or has scales.

    Raises:
        CheckpointError: It is missing, has another shape, or holds NaN or infinity.
    """
    _require_shape(file, name, [shape], path)
    tensor, scale = file.tensor(name), None
    if name + SCALE in file.specs:
        scales = [(shape[0], 1), (1, shape[-1])] if len(shape) == 2 else []
        _require_shape(file, name + SCALE, scales, path)
        scale = file.tensor(name + SCALE)
    if scale is not None or file.specs[name].dtype in FLOATING:
        tensor = Stored(tensor, scale).restored()
        if not is_finite(tensor):
            raise not_finite(path, name)
    return tensor


def _require_shape(file: Tensors, name: str, shapes: Sequence[tuple[int, ...]], path: Path) -> None:
    spec = file.specs.get(name)
    if spec is None or spec.shape not in shapes:
        found = "is missing" if spec is None else f"has shape {spec.shape}"
        needed = " or ".join(map(str, shapes)) or "none"
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


def count_fixed_bytes(file: TensorFile) -> int:
    """Return the bytes of a file's other tensors, which no precision changes."""
    return sum(spec.num_bytes for spec in file.specs.values() if spec.dtype not in FLOATING)
