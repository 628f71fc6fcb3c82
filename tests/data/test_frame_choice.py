import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.frame_choice import Draws, FrameChoice
from ensemble_kit.networks.parts import SAMPLINGS

NAMES = ["random", "random_sequence", "uniform"]
# Those at the ends of an interval too, where float32 rounds a product up to n.
UNIFORM = st.integers(0, 2**24 - 1).map(lambda bits: bits * 2**-24) | st.just(1 - 2**-24)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 9),
    st.integers(1, 9) | st.just(300),
    st.lists(UNIFORM, min_size=9, max_size=9),
)
def test_the_frames_chosen_are_those_that_the_layer_samples(name, num_frames, available, uniform):
    choice = FrameChoice(name, num_frames, in_order=True)
    draws = np.array(uniform[: choice.num_draws], np.float32)
    is_frame = torch.arange(available + 2) < torch.tensor([[available]])
    layer = SAMPLINGS[name](num_frames=num_frames)
    layer_draws = torch.from_numpy(draws)[None]

    sequence = choice.take(draws, available)
    distinct = FrameChoice(name, num_frames, in_order=False).take(draws, available)

    assert layer.num_draws in (choice.num_draws, None)
    assert sequence.rows.tolist() == layer.indices(is_frame, layer_draws)[0, 0].tolist()
    assert sequence.weights.tolist() == [1] * num_frames
    weights = np.zeros(available + 2, np.float32)
    weights[distinct.rows] = distinct.weights
    assert weights.tolist() == layer(is_frame, layer_draws)[0, 0].tolist()
    assert (np.diff(distinct.rows) > 0).all()
    assert distinct.weights.dtype == np.float32
    assert distinct.weights.min() >= 1


def test_draws_depend_on_seed_epoch_and_position_and_on_nothing_asked_before():
    draws = Draws(seed=3)

    first = draws.of(1, 2, 5)
    others = [draws.of(1, 3, 5), draws.of(2, 2, 5), draws.of(2, 1, 5), Draws(seed=4).of(1, 2, 5)]

    assert first.dtype == np.float32
    assert len({tuple(numbers) for numbers in [first, *others]}) == 5
    np.testing.assert_array_equal(draws.of(1, 2, 7)[:5], first)
    np.testing.assert_array_equal(Draws(seed=3).of(1, 2, 5), first)
    published = np.random.Philox(key=1 << 64 | 3, counter=2 << 64).random_raw(5)
    assert first.tolist() == [int(raw >> 40) / 2**24 for raw in published.tolist()]


def test_draws_are_uniform_and_never_one():
    numbers = np.concatenate([Draws(seed=0).of(0, position, 300) for position in range(200)])

    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert abs(counts - 6000).max() < 5 * np.sqrt(6000)
