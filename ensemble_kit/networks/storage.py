"""Round tensors to the precisions that weights are stored in, and measure the error.

fp32, fp16 and bf16 store every floating tensor in that type. int8 and int4 store the matrices of
products in blocks of whole numbers with a scale each, and everything else in bf16.
"""

from collections.abc import Iterator
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kit.choices import Dtype
from ensemble_kit.networks.blocks import fits_blocks, restore_blocks, round_to_blocks
from ensemble_kit.store.blocks import FORMATS, SCALE, BlockFormat, pack
from ensemble_kit.store.dtypes import StorageType, types_of_weights

CHUNK_VALUES = 2**22


class Stored(NamedTuple):
    """A tensor as it is stored.

    Attributes:
        values: Whole numbers, int8, for a matrix in blocks; any type for other tensors.
        scales: The scales of a matrix in blocks, float16; None for other tensors.
        block_format: The format of a matrix in blocks; None for other tensors.
    """

    values: Tensor
    scales: Tensor | None = None
    block_format: BlockFormat | None = None

    def restored(self) -> Tensor:
        """Return the tensor that the stored numbers stand for; floating numbers in float32."""
        if self.scales is not None and self.block_format is not None:
            return restore_blocks(self.values, self.scales, self.block_format)
        return self.values.float() if self.values.is_floating_point() else self.values

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a file stores, by their suffixes to the tensor's name."""
        if self.scales is None or self.block_format is None:
            return {"": self.values}
        packed = torch.from_numpy(pack(self.values.numpy(), self.block_format))
        return {"": packed, SCALE: self.scales}


def torch_type(stored: StorageType) -> torch.dtype:
    """Return torch's dtype for a storage type."""
    dtype: torch.dtype = getattr(torch, stored.numpy)
    return dtype


def round_to(tensor: Tensor, dtype: Dtype, *, output_axis: int | None = None) -> Stored:
    """Round a floating tensor to a precision; other tensors stay as they are.

    Rounding a rounded tensor again changes nothing.

    Args:
        tensor: Any shape.
        dtype: The precision.
        output_axis: Which dimension of a product's matrix counts the outputs; None for other
            tensors. int8 and int4 keep those in bf16, and matrices that do not fit into blocks.
    """
    if not tensor.is_floating_point():
        return Stored(tensor)
    block_format = FORMATS.get(dtype)
    if (
        block_format is not None
        and output_axis is not None
        and fits_blocks(tensor, output_axis, block_format)
    ):
        return Stored(*round_to_blocks(tensor, output_axis, block_format), block_format)
    return Stored(tensor.to(torch_type(types_of_weights(dtype)[-1])))


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    return not tensor.is_floating_point() or all(
        bool(tensor[rows].isfinite().all()) for rows in _chunks(tensor, CHUNK_VALUES)
    )


def relative_error(exact: Tensor, rounded: Tensor, *, chunk_values: int = CHUNK_VALUES) -> float:
    """Return the mean absolute change, divided by the mean absolute value; 0 for zeros.

    Squares would not do: a few large numbers would decide them, whatever happened to the others.
    """
    change, size = 0.0, 0.0
    for rows in _chunks(exact, chunk_values):
        values = exact[rows].double()
        change += float((values - rounded[rows]).abs().sum())
        size += float(values.abs().sum())
    return change / size if size else 0.0


def _chunks(tensor: Tensor, chunk_values: int) -> Iterator[slice | EllipsisType]:
    """Yield slices of the first dimension, so that a large tensor is never copied whole."""
    if tensor.ndim == 0:
        yield ...
        return
    step = max(1, chunk_values * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)
