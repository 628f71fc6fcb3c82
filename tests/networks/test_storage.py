import numpy as np
import pytest
import torch
from builders import tiny_recipe, tiny_schema
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensemble_kit.networks.products import output_axes
from ensemble_kit.networks.storage import Stored, relative_error, round_to
from ensemble_kit.networks.sub_model import SubModel

ROWS, COLUMNS = 64, 80  # 5,120 numbers: more than the least that int8 takes
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


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_the_nearest_of_255_numbers_a_scale_apart(axis, rng):
    values = torch.randn(ROWS, COLUMNS, generator=rng)
    values[3, 5] = 7.0

    whole, scale = round_to(values, "int8", output_axis=axis)

    assert whole.dtype == torch.int8
    assert scale.shape == ((ROWS, 1) if axis == 0 else (1, COLUMNS))
    for row in range(ROWS):
        for column in range(COLUMNS):
            line = values[row] if axis == 0 else values[:, column]
            step = float((line.abs().max() / 127).bfloat16())
            expected = max(-127, min(127, round(float(values[row, column]) / step)))
            assert whole[row, column] == expected, (row, column)
            assert scale[row if axis == 0 else 0, column if axis == 1 else 0] == step


@settings(max_examples=50, deadline=None)
@given(matrices(), st.sampled_from(["fp32", "fp16", "bf16", "int8"]))
def test_rounding_twice_changes_nothing(case, dtype):
    values, axis = case
    once = round_to(values, dtype, output_axis=axis)

    twice = round_to(once.restored(), dtype, output_axis=axis)

    assert torch.equal(once.values, twice.values)
    assert (once.scale is None) == (twice.scale is None)
    assert once.scale is None or torch.equal(once.scale, twice.scale)


@settings(max_examples=50, deadline=None)
@given(matrices())
def test_int8_is_within_half_a_step_of_every_number(case):
    values, axis = case

    stored = round_to(values, "int8", output_axis=axis)

    assert stored.scale is not None
    # the largest may be a quarter of a step outside of 127, as the scale is rounded too
    off = (values - stored.restored()).abs() / stored.scale
    assert off.max() <= 0.5 + 1e-3


def test_an_output_of_zeros_stays_zeros():
    values = torch.ones(ROWS, COLUMNS)
    values[:, 4] = 0.0
    values[:, 6] = 1e-38

    restored = round_to(values, "int8", output_axis=1).restored()

    assert not restored[:, [4, 6]].any()
    assert relative_error(torch.zeros(3), Stored(torch.zeros(3))) == 0


def test_int8_keeps_the_small_the_rest_and_what_it_would_change_much_in_bf16(rng):
    values = torch.randn(ROWS, COLUMNS, generator=rng)
    spiked = values.clone()
    spiked[:, 0] = 400.0  # a step of every row is now larger than its other numbers
    cases = [(values, None), (values[:2], 0), (values[0], None), (spiked, 0)]

    for tensor, axis in cases:
        stored = round_to(tensor, "int8", output_axis=axis)
        assert stored.scale is None
        assert torch.equal(stored.values, tensor.bfloat16())
    assert round_to(spiked, "int8", output_axis=1).scale is not None


def test_the_error_is_the_mean_change_as_a_share_of_the_mean_size(rng, monkeypatch):
    monkeypatch.setattr("ensemble_kit.networks.storage.BLOCK_VALUES", 100)  # many blocks
    values = torch.randn(ROWS, COLUMNS, generator=rng)

    for dtype, axis in (("bf16", None), ("int8", 0), ("int8", 1)):
        stored = round_to(values, dtype, output_axis=axis)
        expected = float((values - stored.restored()).abs().mean() / values.abs().mean())
        assert relative_error(values, stored) == pytest.approx(expected, rel=1e-5)


def test_outputs_are_the_rows_of_pytorchs_matrices_and_the_columns_of_the_kits():
    def product_axes(pooling, **parts):
        return output_axes(SubModel(tiny_recipe(pooling=pooling, **parts), tiny_schema()))

    vlad = product_axes("netvlad")
    assert vlad == {
        "poolings.stream_rgb.assignment.weight": 1,
        "poolings.stream_audio.assignment.weight": 1,
        "hidden.weight": 1,
        "gating.weight": 1,
        "head.gates.weight": 0,
        "head.experts.weight": 0,
    }
    assert "poolings.stream_rgb.covariances" not in product_axes("net_fv")
    cells = product_axes("bigru", gating=None)
    names = [name.rpartition(".cells.")[2] for name, axis in cells.items() if axis == 0]
    assert {"weight_ih_l0", "weight_hh_l1_reverse"} < set(names)
    assert output_axes(nn.Linear(3, 2)) == {"weight": 0}
