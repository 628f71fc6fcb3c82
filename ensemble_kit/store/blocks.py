"""Matrices in blocks of whole numbers with a scale each, and their bytes in a fused file.

A matrix of a product has I inputs and O outputs. The numbers of one output are cut, in the order of
the inputs, into blocks of 128 (``int8``) or 32 (``int4``); the last block has the rest. A fused
file holds such a matrix ``NAME``, of R rows and C columns, as two tensors:

``NAME``
    The whole numbers, row after row.

    ``int8``
        Type I8, shape (R, C): one number a byte, from -127 to 127.
    ``int4``
        Type U8, shape (ceil(R * C / 2),): two numbers a byte, from -7 to 7 in two's complement of
        four bits, so that -7 is 1001. Byte i has number 2 i in its lower and number 2 i + 1 in its
        upper four bits. Where R * C is odd, the upper bits of the last byte are 0.

``NAME.block_scale``
    Type F16, little-endian, row after row: the scale of every block, finite and not negative. Its
    shape is that of the matrix with the inputs counted in blocks: (ceil(R / size), C) where rows
    are inputs, ``x W``, and (R, ceil(C / size)) where columns are, ``x W^T``. So the shape shows
    which of the two it is.

The matrix is each whole number multiplied by the scale of its block, in float32. The bytes of
``NAME`` are those of ONNX's INT8 and INT4 tensors of shape (R, C).
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import Dtype
from ensemble_kit.store.dtypes import BY_NAME

SCALE = ".block_scale"  # suffix of the tensor that holds a matrix's scales
SCALE_TYPE = BY_NAME["fp16"]


class BlockFormat(NamedTuple):
    """How a precision stores the matrices of products.

    Attributes:
        size: Numbers in a block.
        largest: The largest whole number; the smallest is its negative.
        per_byte: Whole numbers in a byte.
    """

    size: int
    largest: int
    per_byte: int

    def scales_shape(self, shape: tuple[int, ...], output_axis: int) -> tuple[int, ...]:
        """Return the shape of the scales of a matrix whose outputs ``output_axis`` counts."""
        sizes = list(shape)
        sizes[1 - output_axis] = -(-sizes[1 - output_axis] // self.size)
        return tuple(sizes)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor that holds the whole numbers of a matrix."""
        return shape if self.per_byte == 1 else (-(-prod(shape) // self.per_byte),)


FORMATS: Mapping[Dtype, BlockFormat] = {
    "int8": BlockFormat(size=128, largest=127, per_byte=1),
    "int4": BlockFormat(size=32, largest=7, per_byte=2),
}


def pack(whole: NDArray[np.int8], block_format: BlockFormat) -> NDArray[Any]:
    """Return the bytes of whole numbers: int8 as they are, or uint8 of one dimension."""
    if block_format.per_byte == 1:
        return whole
    bits = whole.reshape(-1).view(np.uint8)
    packed = np.zeros(-(-bits.size // 2), np.uint8)
    np.bitwise_and(bits[0::2], 0x0F, out=packed)
    packed[: bits.size // 2] |= bits[1::2] << 4
    return packed


def unpack(packed: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Return whole numbers from their bytes, int8 of the matrix's shape."""
    if packed.dtype == np.int8:
        return packed.reshape(shape)
    whole = np.empty(2 * packed.size, np.uint8)
    np.left_shift(packed, 4, out=whole[0::2])
    whole[1::2] = packed
    signed = whole.view(np.int8)
    signed >>= 4  # an arithmetic shift, which copies the sign
    return signed[: prod(shape)].reshape(shape)
