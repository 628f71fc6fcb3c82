import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.networks.storage import relative_error, round_to
from ensemble_kit.store.dtypes import DTYPES

ROWS, COLUMNS = 64, 80  # 5,120 numbers: more than the least that blocks take
TYPES = [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]


@st.composite
def matrices(draw):
    """Normal numbers, of another size for each output, and the axis of the outputs."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = random.integers(-draw(st.integers(0, 30)), 9, (ROWS, 1))
    values = random.standard_normal((ROWS, COLUMNS)) * 2.0**exponents
    axis = draw(st.sampled_from([0, 1]))
    return torch.from_numpy(values if axis == 0 else values.T).float().contiguous(), axis


@pytest.mark.parametrize(("dtype", "expected"), TYPES)
def test_floating_tensors_are_rounded_and_counts_are_not(dtype, expected):
    third = torch.tensor([1 / 3])

    assert round_to(third, dtype).values.dtype == expected
    assert torch.equal(round_to(third, dtype).restored(), third.to(expected).float())
    assert torch.equal(
        round_to(torch.tensor([2**30 + 1]), dtype).restored(), torch.tensor([2**30 + 1])
    )
    assert round_to(torch.tensor(1 / 3), dtype).values.shape == ()


@settings(max_examples=50, deadline=None)
@given(matrices(), st.sampled_from(DTYPES))
def test_rounding_twice_changes_nothing(case, dtype):
    values, axis = case
    once = round_to(values, dtype, output_axis=axis)

    twice = round_to(once.restored(), dtype, output_axis=axis)

    assert once.tensors().keys() == twice.tensors().keys()
    for suffix, tensor in once.tensors().items():
        assert torch.equal(tensor, twice.tensors()[suffix])


@pytest.mark.parametrize(("dtype", "packed"), [("int8", torch.int8), ("int4", torch.uint8)])
def test_blocks_are_for_the_matrices_of_products_that_fit(dtype, packed, rng):
    values = torch.randn(ROWS, COLUMNS, generator=rng)
    spiked = values.clone()
    spiked[:, ::32] = 400.0  # a step of every block is now larger than its other numbers

    for axis in (0, 1):
        stored = round_to(values, dtype, output_axis=axis)
        assert {suffix: tensor.dtype for suffix, tensor in stored.tensors().items()} == {
            "": packed, ".block_scale": torch.float16
        }  # fmt: skip
        assert stored.restored().dtype == torch.float32
        assert relative_error(values, stored.restored()) < {"int8": 0.01, "int4": 0.15}[dtype]
    for tensor, axis in [(values, None), (values[:2], 0), (values[0], None), (spiked, 0)]:
        stored = round_to(tensor, dtype, output_axis=axis)
        assert stored.tensors().keys() == {""}
        assert torch.equal(stored.values, tensor.bfloat16())


def test_the_error_is_the_mean_change_as_a_share_of_the_mean_size(rng):
    values = torch.randn(ROWS, COLUMNS, generator=rng)

    rounded = values.bfloat16()

    expected = float((values - rounded.float()).abs().mean() / values.abs().mean())
    for chunk_values in (100, values.numel()):
        error = relative_error(values, rounded, chunk_values=chunk_values)
        assert error == pytest.approx(expected, rel=1e-5)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
