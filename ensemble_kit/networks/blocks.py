"""Round matrices to blocks of whole numbers with a scale each.

``ensemble_kit.store.blocks`` describes the bytes on disk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ensemble_kit.store.blocks import BlockFormat

CLIPS = (
    1.0,
    0.95,
    0.9,
    0.85,
    0.8,
)  # on normally distributed numbers, 41 of them gain only 1 % more
MIN_VALUES = 4096  # a smaller matrix saves too little to be worth the risk
MAX_LOST_BLOCKS = 0.01
# The largest share of a block's numbers that may become 0. In normally distributed blocks 1 %
# (int8) and 14 % (int4) do; one number ten times as large as the others makes that 8 % and 80 %.
MAX_ZEROS = {127: 0.125, 7: 0.5}
MAX_SCALE = torch.finfo(torch.float16).max
CHUNK_VALUES = 2**18  # numbers at a time, so that they fit a processor's cache


def fits_blocks(matrix: Tensor, output_axis: int, block_format: BlockFormat) -> bool:
    """Return whether a matrix can be rounded to blocks without losing too much.

    A small matrix does not fit, nor does one that loses more than 1 % of its blocks. A block is
    lost if so many of its numbers become 0 that little more than its largest are left. All blocks
    count the same, so that neither large numbers nor large blocks hide the loss of others. A matrix
    with NaN or infinity never fits.

    Args:
        matrix: ``(R, C)``, floating point.
        output_axis: Which dimension counts the outputs.
        block_format: One of ``FORMATS``.
    """
    if matrix.ndim != 2 or matrix.numel() < MIN_VALUES:
        return False
    num_lost = num_blocks = 0
    for _, values, dim in _chunks(matrix, output_axis, block_format.size):
        # as bf16, so that a matrix that was kept in bf16 is not judged differently the next time
        sizes = values.bfloat16().float().abs_()
        largest = sizes.amax(dim, keepdim=True)
        if not bool((largest <= MAX_SCALE * block_format.largest).all()):  # False with NaN too
            return False
        scales = _scales(largest, CLIPS[0], block_format)
        # A number becomes 0 if it is at most half of the scale. No quotient is rounded across that:
        # a bf16 number other than half of a float16 one is at least a 2^-12th away from it.
        half = torch.where(scales > 0, scales / 2, torch.inf)
        num_small, num_zeros = (sizes <= half).sum(dim), (sizes == 0).sum(dim)
        counts = (num_small - num_zeros) / (sizes.shape[dim] - num_zeros).clamp_min(1)
        num_lost += int((counts > MAX_ZEROS[block_format.largest]).sum())
        num_blocks += counts.numel()
    return num_lost <= MAX_LOST_BLOCKS * num_blocks


def round_to_blocks(
    matrix: Tensor, output_axis: int, block_format: BlockFormat, *, chunk_values: int = CHUNK_VALUES
) -> tuple[Tensor, Tensor]:
    """Round a matrix to whole numbers times a scale for each block.

    Rounding a rounded matrix again finds the same scales and changes nothing.

    Args:
        matrix: ``(R, C)``, floating point; see ``fits_blocks``.
        output_axis: Which dimension counts the outputs.
        block_format: One of ``FORMATS``.
        chunk_values: How many numbers are rounded at a time; the result is the same for any.

    Returns:
        Whole numbers, int8 ``(R, C)``, and scales, float16 of ``BlockFormat.scales_shape``.
    """
    scales = block_scales(matrix, output_axis, block_format, chunk_values=chunk_values)
    return whole_numbers(matrix, scales, block_format, chunk_values=chunk_values), scales


def block_scales(
    matrix: Tensor, output_axis: int, block_format: BlockFormat, *, chunk_values: int = CHUNK_VALUES
) -> Tensor:
    """Return the scale of each block that gives the least squared error.

    The scales that are tried clip a block's largest numbers at different sizes. They are rounded
    down to float16, so that a block's largest number always becomes the largest whole number, from
    which the same scale is found again.
    """
    scales = torch.empty(block_format.scales_shape(tuple(matrix.shape), output_axis)).half()
    for rows, values, dim in _chunks(matrix, output_axis, block_format.size, chunk_values):
        best = _search(values, dim, block_format).squeeze(dim).half()
        scales[_scale_rows(rows, dim, block_format)] = best
    return scales


def whole_numbers(
    matrix: Tensor, scales: Tensor, block_format: BlockFormat, *, chunk_values: int = CHUNK_VALUES
) -> Tensor:
    """Return the whole numbers, int8, that are nearest to a matrix divided by given scales."""
    whole = torch.empty(matrix.shape, dtype=torch.int8)
    output_axis = _output_axis(matrix, scales, block_format)
    for rows, values, dim in _chunks(matrix, output_axis, block_format.size, chunk_values):
        used = scales[_scale_rows(rows, dim, block_format)].float().unsqueeze(dim)
        nearest = _nearest(values, used, block_format).to(torch.int8).flatten(dim - 1, dim)
        whole[rows] = nearest[: len(whole[rows]), : matrix.shape[1]]
    return whole


def restore_blocks(
    whole: Tensor, scales: Tensor, block_format: BlockFormat, *, chunk_values: int = CHUNK_VALUES
) -> Tensor:
    """Return the matrix that whole numbers and scales stand for, float32 ``(R, C)``."""
    restored = whole.float()
    dim = 2 - _output_axis(whole, scales, block_format)
    for rows in _rows(whole, block_format.size if dim == 1 else 1, chunk_values):
        used = scales[_scale_rows(rows, dim, block_format)].float()
        factors = used.repeat_interleave(block_format.size, dim=dim - 1)
        restored[rows] *= factors[: rows.stop - rows.start, : whole.shape[1]]
    return restored


def _output_axis(matrix: Tensor, scales: Tensor, block_format: BlockFormat) -> int:
    by_columns = block_format.scales_shape(tuple(matrix.shape), 0)
    return 0 if tuple(scales.shape) == by_columns else 1


def _scale_rows(rows: slice, dim: int, block_format: BlockFormat) -> slice:
    """Return where the scales of some rows of a matrix are."""
    if dim == 2:
        return rows
    return slice(rows.start // block_format.size, -(-rows.stop // block_format.size))


def _search(values: Tensor, dim: int, block_format: BlockFormat) -> Tensor:
    """Return the scale of each block that has the least squared error, in float32."""
    largest = values.abs().amax(dim, keepdim=True)
    best = _scales(largest, CLIPS[0], block_format)
    least = _squared_error(values, best, dim, block_format)
    for clip in CLIPS[1:]:
        scales = _scales(largest, clip, block_format)
        error = _squared_error(values, scales, dim, block_format)
        is_better = error < least
        best = torch.where(is_better, scales, best)
        least = torch.where(is_better, error, least)
    return best


def _scales(largest: Tensor, clip: float, block_format: BlockFormat) -> Tensor:
    """Return ``largest * clip / block_format.largest``, rounded down to float16, as float32."""
    exact = largest * clip / block_format.largest
    nearest = exact.half()
    # positive float16 numbers are ordered as their bits, so the next one below is one less
    below = (nearest.view(torch.int16) - 1).view(torch.float16)
    return torch.where(nearest.float() > exact, below, nearest).float()


def _nearest(values: Tensor, scales: Tensor, block_format: BlockFormat) -> Tensor:
    divided = values / torch.where(scales > 0, scales, torch.inf)  # a block of zeros stays zeros
    return divided.round_().clamp_(-block_format.largest, block_format.largest)


def _squared_error(values: Tensor, scales: Tensor, dim: int, block_format: BlockFormat) -> Tensor:
    restored = _nearest(values, scales, block_format).mul_(scales)
    return restored.sub_(values).square_().sum(dim, keepdim=True)


def _chunks(
    matrix: Tensor, output_axis: int, size: int, chunk_values: int = CHUNK_VALUES
) -> Iterator[tuple[slice, Tensor, int]]:
    """Yield some rows, their numbers as float32 blocks, and the dimension along a block.

    Blocks are ``(num, size, C)`` along rows and ``(rows, num, size)`` along columns; the last one
    of an output is padded with zeros.
    """
    step = size if output_axis == 1 else 1
    for rows in _rows(matrix, step, chunk_values):
        values = matrix[rows].float()
        missing = -values.shape[1 - output_axis] % size
        if output_axis == 1:
            yield rows, pad(values, (0, 0, 0, missing)).reshape(-1, size, values.shape[1]), 1
        else:
            yield rows, pad(values, (0, missing)).reshape(len(values), -1, size), 2


def _rows(matrix: Tensor, step: int, chunk_values: int) -> Iterator[slice]:
    """Yield slices of rows, each but the last a multiple of ``step`` long."""
    length = max(1, chunk_values // (step * max(1, matrix.shape[1]))) * step
    for start in range(0, len(matrix), length):
        yield slice(start, min(start + length, len(matrix)))
