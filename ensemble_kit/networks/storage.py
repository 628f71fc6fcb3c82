"""The types that weights are stored in, and what each loses. Imports ``provenance``.

fp32, fp16 and bf16 store every floating tensor in that type. int8 stores the matrices of products
as whole numbers from -127 to 127 times a scale for each output, and all else in bf16.
"""

from collections.abc import Iterator
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kit.choices import Dtype
from ensemble_kit.store.dtypes import BY_NAME, StorageType

SCALE = ".int8_scale"  # what follows a matrix's name in its scales'
MIN_INT8_VALUES = 4096  # a smaller matrix saves less than its risk is worth
MAX_INT8_ERROR = 0.02  # normal numbers change by 0.01 of their size; few large ones spoil the rest
LARGEST = 127
TINY = 2.0**-100  # an output whose weights are all smaller is stored as zeros
BLOCK_VALUES = 2**22


class Stored(NamedTuple):
    """A tensor as it is stored: whole numbers with scales, or any other type without."""

    values: Tensor
    scale: Tensor | None = None

    def restored(self) -> Tensor:
        """Return what the stored numbers stand for, floating ones in float32."""
        if self.scale is not None:
            return self.values.float().mul_(self.scale)
        return self.values.float() if self.values.is_floating_point() else self.values


def torch_type(stored: StorageType) -> torch.dtype:
    """Return torch's type of stored numbers."""
    dtype: torch.dtype = getattr(torch, stored.numpy)
    return dtype


def round_to(tensor: Tensor, dtype: Dtype, *, output_axis: int | None = None) -> Stored:
    """Round a tensor to the type it is to be stored in; only floating ones change.

    Rounding what has been rounded changes nothing: the scales of int8 are bfloat16 numbers, so 127
    times one is exact, and the largest weight of an output is 127 times its scale.

    Args:
        tensor: Any shape.
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        output_axis: Which dimension of a product's matrix counts the outputs; None for all else,
            which int8 keeps in bf16, as it does matrices that it would change by more than 2 %.

    Returns:
        Scales are float32, ``(rows, 1)`` or ``(1, columns)``.
    """
    if not tensor.is_floating_point():
        return Stored(tensor)
    if dtype != "int8":
        return Stored(tensor.to(torch_type(BY_NAME[dtype])))
    if output_axis is not None and tensor.numel() >= MIN_INT8_VALUES:
        stored = _round_to_int8(tensor, output_axis)
        if relative_error(tensor, stored) <= MAX_INT8_ERROR:  # False with NaN or infinity
            return stored
    return Stored(tensor.bfloat16())


def _round_to_int8(tensor: Tensor, output_axis: int) -> Stored:
    low, high = tensor.aminmax(dim=1 - output_axis, keepdim=True)
    scale = (torch.maximum(high, -low).float() / LARGEST).bfloat16().float()
    scale = torch.where(scale > TINY, scale, torch.ones(()))
    whole = torch.empty(tensor.shape, dtype=torch.int8)
    for rows in _blocks(tensor):
        divided = tensor[rows].float() / (scale[rows] if output_axis == 0 else scale)
        whole[rows] = divided.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Stored(whole, scale)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    return not tensor.is_floating_point() or all(
        bool(tensor[rows].isfinite().all()) for rows in _blocks(tensor)
    )


def relative_error(exact: Tensor, stored: Stored) -> float:
    """Return the mean change of a number as a share of the mean size of one; 0 for zeros.

    Not of squares, which a few large numbers would rule whatever became of the others.
    """
    change, size = 0.0, 0.0
    for rows in _blocks(exact):
        is_by_row = stored.scale is not None and stored.scale.shape[0] > 1
        scale = stored.scale[rows] if is_by_row and stored.scale is not None else stored.scale
        values = exact[rows].double()
        change += float((values - Stored(stored.values[rows], scale).restored()).abs().sum())
        size += float(values.abs().sum())
    return change / size if size else 0.0


def _blocks(tensor: Tensor) -> Iterator[slice | EllipsisType]:
    """Yield slices of the first dimension, so that no copy of a large tensor is ever made."""
    if tensor.ndim == 0:
        yield ...
        return
    step = max(1, BLOCK_VALUES * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)
