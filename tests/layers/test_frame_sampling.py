import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_indices_loops, sequence_indices_loops, uniform_indices_loops

from ensemble_kit.layers.frame_preparation import mark_frames
from ensemble_kit.layers.frame_sampling import (
    AllFrames,
    RandomSampling,
    SequenceSampling,
    UniformSampling,
    count_draws,
    draw_table,
)


def counts_of(indices, length):
    return [float(indices.count(t)) for t in range(length)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.lists(
        st.lists(st.floats(0, 1, exclude_max=True, width=16), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    ),
)
def test_random_sampling_counts_the_papers_indices(lengths, draws):
    is_frame = mark_frames(torch.tensor(lengths), 7)

    weights = RandomSampling(num_frames=5)(is_frame, torch.tensor(draws))

    for video, length in enumerate(lengths):
        for repeat, row in enumerate(draws):
            paper = counts_of(random_indices_loops(row, length), 7)
            assert weights[video, repeat].tolist() == paper


def test_each_video_may_have_draws_of_its_own(rng):
    is_frame = mark_frames(torch.tensor([7, 3]), 7)
    draws = torch.rand(2, 4, 5, generator=rng)
    sampling = RandomSampling(num_frames=5)

    weights = sampling(is_frame, draws)

    assert torch.equal(weights[:1], sampling(is_frame[:1], draws[0]))
    assert torch.equal(weights[1:], sampling(is_frame[1:], draws[1]))


@pytest.mark.parametrize("draw", [1 - 2**-24, 1.0])
@pytest.mark.parametrize("length", [1, 3, 255, 257, 300])
def test_a_draw_close_to_one_takes_the_last_frame(draw, length):
    is_frame = mark_frames(torch.tensor([length]), 300)

    weights = RandomSampling(num_frames=1)(is_frame, torch.tensor([[draw]]))

    assert weights.nonzero().tolist() == [[0, 0, length - 1]]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.lists(st.floats(0, 1, exclude_max=True, width=16), min_size=1, max_size=4),
)
def test_sequence_sampling_takes_the_papers_indices(num_frames, lengths, draws):
    is_frame = mark_frames(torch.tensor(lengths), 7)
    sampling = SequenceSampling(num_frames=num_frames)
    table = torch.tensor(draws).unsqueeze(1)

    indices = sampling.indices(is_frame, table)
    weights = sampling(is_frame, table)

    assert sampling.num_draws == 1
    for video, length in enumerate(lengths):
        for repeat, draw in enumerate(draws):
            paper = sequence_indices_loops(draw, length, num_frames)
            assert indices[video, repeat].tolist() == paper
            assert weights[video, repeat].tolist() == counts_of(paper, 7)


@pytest.mark.parametrize("draw", [1 - 2**-24, 1.0])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 255, 257, 300])
def test_a_draw_close_to_one_takes_the_last_sequence(draw, length):
    is_frame = mark_frames(torch.tensor([length]), 300)

    indices = SequenceSampling(num_frames=4).indices(is_frame, torch.tensor([[draw]]))

    assert indices.flatten().tolist() == sequence_indices_loops(1 - 2**-24, length, 4)


def test_without_draws_each_video_starts_its_sequence_afresh():
    is_frame = mark_frames(torch.tensor([100, 100, 3]), 100)
    torch.manual_seed(0)
    sampling = SequenceSampling(num_frames=5)

    first, second = sampling.indices(is_frame), sampling.indices(is_frame)

    assert first.shape == (3, 1, 5)
    assert (first[:2].diff(dim=-1) == 1).all()
    assert first[2].tolist() == [[0, 1, 2, 2, 2]]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.floats(0, 1, exclude_max=True, width=16),
    st.sampled_from([RandomSampling, SequenceSampling, UniformSampling]),
)
def test_weights_count_the_indices_and_no_index_is_padding(lengths, draw, sampling):
    is_frame = mark_frames(torch.tensor(lengths), 7)
    sampling = sampling(num_frames=5)
    draws = torch.full((2, sampling.num_draws or 1), draw)

    indices, weights = sampling.indices(is_frame, draws), sampling(is_frame, draws)

    for video, length in enumerate(lengths):
        for taken, row in zip(indices[video].tolist(), weights[video].tolist(), strict=True):
            assert len(taken) == 5
            assert all(0 <= index < max(length, 1) for index in taken)
            assert row == (counts_of(taken, 7) if length else [0.0] * 7)


def test_without_draws_each_video_is_drawn_afresh_from_its_own_frames():
    is_frame = mark_frames(torch.tensor([100, 100, 3]), 100)
    torch.manual_seed(0)
    sampling = RandomSampling(num_frames=60)

    first, second = sampling(is_frame), sampling(is_frame)

    assert first.shape == (3, 1, 100)
    assert first.sum(dim=-1).tolist() == [[60.0], [60.0], [60.0]]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert (first[2, 0, :3] > 0).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_uniform_sampling_takes_the_papers_indices(num_frames, lengths):
    is_frame = mark_frames(torch.tensor(lengths), 7)

    weights = UniformSampling(num_frames=num_frames)(is_frame)

    for video, length in enumerate(lengths):
        paper = counts_of(uniform_indices_loops(num_frames, length), 7)
        assert weights[video].tolist() == [paper]


def test_uniform_sampling_is_exact_at_the_papers_sizes():
    for length in range(1, 301):
        is_frame = mark_frames(torch.tensor([length]), 300)
        weights = UniformSampling(num_frames=256)(is_frame)
        assert weights[0, 0].tolist() == counts_of(uniform_indices_loops(256, length), 300)


def test_all_frames_count_once_and_padding_never():
    weights = AllFrames()(mark_frames(torch.tensor([4, 0, 2]), 4))

    assert weights.tolist() == [[[1.0] * 4], [[0.0] * 4], [[1.0, 1.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    "sampling",
    [RandomSampling(num_frames=5), SequenceSampling(num_frames=5), UniformSampling(num_frames=5)],
)
def test_a_video_of_no_frames_has_no_weights(sampling):
    weights = sampling(
        mark_frames(torch.tensor([0, 2]), 3), torch.full((1, sampling.num_draws or 1), 0.5)
    )

    assert weights.sum(dim=-1).tolist() == [[0.0], [5.0]]


def test_draws_are_counted_with_repetition():
    is_frame = torch.tensor([[True, True, True, False]])

    counts = count_draws(torch.tensor([[[0, 2, 0], [1, 1, 1], [3, 3, 0]]]), is_frame)

    assert counts.tolist() == [[[2, 0, 1, 0], [0, 3, 0, 0], [1, 0, 0, 0]]]


@settings(max_examples=50, deadline=None)
@given(st.text(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_the_first_rows_of_a_larger_table_are_those_of_a_smaller(name, repeats, more, num_frames):
    small = draw_table(name, repeats=repeats, num_frames=num_frames)
    large = draw_table(name, repeats=repeats + more, num_frames=num_frames)

    assert small.shape == (repeats, num_frames)
    assert torch.equal(large[:repeats], small)
    assert small.min() >= 0
    assert small.max() < 1


def test_members_of_different_names_draw_differently():
    tables = [draw_table(name, repeats=3, num_frames=300) for name in ("gru", "gru2", "")]

    assert torch.equal(tables[0], draw_table("gru", repeats=3, num_frames=300))
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert abs(torch.corrcoef(torch.stack([tables[one].ravel(), tables[other].ravel()]))[0, 1]
                   ) < 0.1  # fmt: skip


def test_the_table_is_uniform():
    table = draw_table("any", repeats=10, num_frames=1000)

    shares = table.histc(bins=10, min=0, max=1) / table.numel()
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.015)  # 5 sigma


def test_the_table_is_the_same_on_every_machine():
    # python -c 'from ensemble_kit.layers.frame_sampling import draw_table;
    #            print((draw_table("willow-gru", repeats=1, num_frames=4) * 2**24).tolist())'
    assert (draw_table("willow-gru", repeats=1, num_frames=4) * 2**24).tolist() == [
        [4583628.0, 13897601.0, 2968222.0, 11041505.0]
    ]
