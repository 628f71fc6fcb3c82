"""Block precisions, read back by loops written from the layout in ``ensemble_kit.store.blocks``."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.networks import blocks
from ensemble_kit.networks.blocks import fits_blocks, restore_blocks, round_to_blocks
from ensemble_kit.store.blocks import FORMATS, pack, unpack

FORMAT_NAMES = sorted(FORMATS)
AXES = (0, 1)


def whole_numbers_of(data, count, name):
    """Return whole numbers from the bytes of a stored matrix, by the documented layout."""
    if name == "int8":
        return [byte - 256 if byte > 127 else byte for byte in data][:count]
    nibbles = [half for byte in data for half in (byte & 15, byte >> 4)]
    return [nibble - 16 if nibble > 7 else nibble for nibble in nibbles][:count]


def matrix_of(data, scales, shape, name):
    """Return a matrix from the bytes of its two tensors, by the documented layout."""
    size = {"int8": 128, "int4": 32}[name]
    rows, columns = shape
    whole = whole_numbers_of(data, rows * columns, name)
    by_row = scales.shape == (-(-rows // size), columns)
    matrix = np.zeros(shape, np.float32)
    for row in range(rows):
        for column in range(columns):
            place = (row // size, column) if by_row else (row, column // size)
            matrix[row, column] = np.float32(whole[row * columns + column]) * np.float32(
                scales[place]
            )
    return matrix


@st.composite
def matrices(draw):
    """Normal numbers, of another size in each row, with some zeros and rows of zeros."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(150, 7), (7, 150), (64, 66), (1, 40), (129, 33)]))
    exponents = random.integers(-draw(st.integers(0, 30)), 9, (shape[0], 1))
    values = random.standard_normal(shape) * 2.0**exponents
    values[random.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = 0.0
    return torch.from_numpy(values).float()


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(256, 64), (150, 7), (7, 151), (33, 3)])
def test_the_documented_bytes_are_the_matrix(name, axis, shape, rng):
    matrix = torch.randn(shape, generator=rng)

    whole, scales = round_to_blocks(matrix, axis, FORMATS[name])
    packed = pack(whole.numpy(), FORMATS[name])

    assert packed.shape == FORMATS[name].packed_shape(shape)
    assert scales.dtype == torch.float16
    assert tuple(scales.shape) == FORMATS[name].scales_shape(shape, axis)
    expected = matrix_of(packed.tobytes(), scales.numpy(), shape, name)
    np.testing.assert_array_equal(restore_blocks(whole, scales, FORMATS[name]).numpy(), expected)
    assert np.abs(expected - matrix.numpy()).max() < {"int8": 0.03, "int4": 0.6}[name]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_bytes_of_four_bits_are_those_of_the_text(count):
    whole = np.resize(np.array([-7, 7, 0, -1, 3], np.int8), count)

    packed = pack(whole.reshape(1, count), FORMATS["int4"])

    assert whole_numbers_of(packed.tobytes(), count, "int4") == whole.tolist()
    assert packed[:1].tolist() == [[], [0b1001], [0b0111_1001], [0b0111_1001]][min(count, 3)]
    assert unpack(packed, (count,)).tolist() == whole.tolist()


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(FORMAT_NAMES), st.sampled_from(AXES))
def test_rounding_twice_changes_nothing(matrix, name, axis):
    whole, scales = round_to_blocks(matrix, axis, FORMATS[name])
    once = restore_blocks(whole, scales, FORMATS[name])

    again, scales_again = round_to_blocks(once, axis, FORMATS[name])

    assert torch.equal(whole, again)
    assert torch.equal(scales, scales_again)


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from(FORMAT_NAMES), st.sampled_from(AXES))
def test_a_block_takes_the_scale_with_the_least_squared_error(matrix, name, axis):
    block_format = FORMATS[name]
    whole, scales = round_to_blocks(matrix, axis, block_format)
    restored = restore_blocks(whole, scales, block_format)
    across = matrix if axis == 0 else matrix.T
    ours = restored if axis == 0 else restored.T

    for start in range(0, across.shape[1], block_format.size):
        block = across[:, start : start + block_format.size].double()
        found = (ours[:, start : start + block_format.size].double() - block).square().sum(1)
        for clip in blocks.CLIPS:
            exact = block.abs().amax(1, keepdim=True).float() * clip / block_format.largest
            scale = exact.half().double()
            nearest = (block / scale).round().clamp(-block_format.largest, block_format.largest)
            error = (nearest.nan_to_num() * scale - block).square().sum(1)
            # a scale is rounded down and not to the nearest, one part in 1,024 at most
            slack = (block.abs().sum(1) * scale.squeeze(1)) * 2**-9
            assert (found <= error + slack + 1e-12)[scale.squeeze(1) > 2**-14].all()


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("axis", AXES)
def test_the_largest_number_of_a_block_is_the_largest_whole_number(name, axis, rng):
    matrix = torch.randn(128, 128, generator=rng)

    whole, scales = round_to_blocks(matrix, axis, FORMATS[name])

    along = whole if axis == 0 else whole.T
    for part in along.abs().split(FORMATS[name].size, dim=1):
        assert (part.amax(1) == FORMATS[name].largest).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("axis", AXES)
def test_a_few_large_numbers_cannot_hide_what_becomes_of_the_rest(name, axis, rng):
    matrix = torch.randn(256, 256, generator=rng)
    assert fits_blocks(matrix, axis, FORMATS[name])

    for size in (1e2, 1e5):  # one number of every block, then of one block
        spiked = matrix.clone()
        along = spiked if axis == 0 else spiked.T
        along[:, :: FORMATS[name].size] = size
        assert not fits_blocks(spiked, axis, FORMATS[name]), size
        few = matrix.clone()
        few[3, 5] = size
        assert fits_blocks(few, axis, FORMATS[name])


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_block_is_lost_if_too_many_of_its_numbers_round_to_0(name, rng):
    block_format, found = FORMATS[name], []
    for power in torch.linspace(1, 4, 91):  # the larger, the more of a block are small
        matrix = torch.randn(64, 3 * block_format.size, generator=rng)
        matrix = (matrix.abs() ** power * matrix.sign()).bfloat16().double()
        num_lost = 0
        for block in matrix.reshape(-1, block_format.size).numpy():
            scale = np.float16(np.abs(block).max() / block_format.largest)
            if scale * block_format.largest > np.abs(block).max():
                scale = np.nextafter(scale, np.float16(0))
            share = np.mean(np.rint(block / np.float64(scale)) == 0)
            num_lost += share > blocks.MAX_ZEROS[block_format.largest]
        found.append(num_lost <= 0.01 * matrix.numel() / block_format.size)
        assert fits_blocks(matrix.float(), 0, block_format) == found[-1]
    assert set(found) == {True, False}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_what_cannot_be_stored_in_blocks_does_not_fit(name, rng):
    matrix = torch.randn(64, 128, generator=rng)

    assert fits_blocks(matrix, 1, FORMATS[name])
    assert not fits_blocks(matrix[:31], 1, FORMATS[name])  # too small
    assert not fits_blocks(matrix.flatten(), 1, FORMATS[name])
    assert not fits_blocks(matrix * 1e-9, 1, FORMATS[name])  # below float16's scales
    assert not fits_blocks(matrix * 1e9, 1, FORMATS[name])  # above them
    for value in (float("nan"), float("inf")):
        matrix[3, 4] = value
        assert not fits_blocks(matrix, 1, FORMATS[name])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 8), st.sampled_from(FORMAT_NAMES))
def test_a_matrix_that_was_kept_finer_once_is_kept_finer_again(seed, spike, name):
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(64, 128, generator=random)
    matrix[:, ::32] *= 2**spike
    fits = fits_blocks(matrix, 0, FORMATS[name])

    once = matrix.bfloat16().float()
    if fits:
        once = restore_blocks(*round_to_blocks(matrix, 0, FORMATS[name]), FORMATS[name])

    assert fits_blocks(once, 0, FORMATS[name]) == fits


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("axis", AXES)
def test_chunks_change_nothing(name, axis, rng):
    matrix = torch.randn(300, 70, generator=rng)
    whole, scales = round_to_blocks(matrix, axis, FORMATS[name])

    parts = round_to_blocks(matrix, axis, FORMATS[name], chunk_values=100)

    assert torch.equal(parts[0], whole)
    assert torch.equal(parts[1], scales)
    restored = restore_blocks(whole, scales, FORMATS[name], chunk_values=100)
    assert torch.equal(restored, restore_blocks(whole, scales, FORMATS[name]))
