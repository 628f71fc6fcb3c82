"""Resamples of the videos, against a ranking in which every pair is repeated in its place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.selection.bootstrap import centred, interval, resampled_gaps
from ensemble_kit.selection.ranking import ABSENT, key_flags, pooled_gap, to_keys


def pool_of(scores, hits):
    """Return the pool of rows of scores, best first; -inf is absent."""
    flags = key_flags(hits)
    flags[np.isneginf(scores)] = ABSENT
    return np.ascontiguousarray(to_keys(np.maximum(scores, 0), flags)[:, ::-1])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_resample_counts_a_video_as_often_as_it_was_drawn(data):
    num_videos, k = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    score = st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0])
    cells = st.lists(score, min_size=num_videos * k, max_size=num_videos * k)
    scores = -np.sort(-np.array(data.draw(cells)).reshape(num_videos, k), axis=1)
    hits = data.draw(st.lists(st.booleans(), min_size=scores.size, max_size=scores.size))
    hits = np.array(hits).reshape(scores.shape) & (scores > -np.inf)
    positives = hits.sum(axis=1) + 1
    pool = pool_of(scores, hits)

    (gaps,) = resampled_gaps([pool], positives, resamples=3, seed=7)

    for index, gap in enumerate(gaps):
        drawn = np.random.default_rng([7, index]).integers(num_videos, size=num_videos).tolist()
        ranking = sorted(
            (-score, video, place)
            for (video, place), score in np.ndenumerate(scores)
            if score > -np.inf
        )
        pairs = found = total = 0
        for _, video, place in ranking:
            count = drawn.count(video)
            pairs += count
            if hits[video, place]:
                found += count
                total += count * found / max(pairs, 1)
        expected = total / sum(positives[video] for video in drawn)
        assert gap == pytest.approx(expected, abs=1e-12)


def test_intervals_lie_about_the_gap_and_pools_are_resampled_alike():
    generator = np.random.default_rng(0)
    scores = -np.sort(-generator.random((200, 4)), axis=1)
    hits = generator.random((200, 4)) < scores
    pool, positives = pool_of(scores, hits), hits.sum(axis=1)

    first, second = resampled_gaps([pool, pool], positives, resamples=100, seed=0)

    low, high = interval(first)
    assert low < pooled_gap(pool, positives.sum()) < high
    assert high - low < 0.2
    np.testing.assert_array_equal(first, second)
    again = resampled_gaps([pool], positives, resamples=100, seed=1)
    assert not np.array_equal(again[0], first)


def test_an_interval_holds_the_middle_95_percent():
    low, high = interval(np.arange(1001) / 1000)

    assert (low, high) == (pytest.approx(0.025), pytest.approx(0.975))


def test_without_positives_every_resample_is_0():
    gaps = resampled_gaps([pool_of(np.ones((2, 1)), np.zeros((2, 1), bool))],
                          np.zeros(2, np.int64), resamples=2, seed=0)  # fmt: skip

    assert gaps.tolist() == [[0.0, 0.0]]


def test_resamples_are_centred_on_what_was_measured():
    drawn = np.array([[0.25, 0.75], [0.5, 1.0]])

    found = centred(drawn, [0.25, 0.5])

    assert found.tolist() == [[0.0, 0.5], [0.25, 0.75]]
    assert centred(np.empty((2, 0)), [0.25, 0.5]).shape == (2, 0)
