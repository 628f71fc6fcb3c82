"""Macro mAP of mixtures against plain loops over all of their probabilities."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from candidate_builders import candidates_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import macro_map_loops, mixed_loops

from ensemble_kit.ranking_metrics import measure_rankings
from ensemble_kit.selection.class_scoring import ClassJudge, counts_at_least
from ensemble_kit.selection.class_table import read_class_table
from ensemble_kit.selection.scoring import Term
from ensemble_kit.selection.storage import Storage

PLENTY = 2**30


@st.composite
def cases(draw):
    """Few distinct scores, so that ties are everywhere; some videos without a label."""
    num_videos, num_classes = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    row = st.lists(
        st.sampled_from([0.0, 0.125, 0.25, 0.75]), min_size=num_classes, max_size=num_classes
    )
    one = st.lists(row, min_size=num_videos, max_size=num_videos)
    rows = draw(st.lists(one, min_size=1, max_size=3))
    classes = st.sets(st.integers(0, num_classes - 1), max_size=3)
    positives = draw(st.lists(classes, min_size=num_videos, max_size=num_videos))
    positives[0] |= {0}
    order = draw(st.permutations(range(len(rows))))
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=3, max_size=3))
    return rows, positives, [Term(*pair) for pair in zip(order, weights, strict=False)]


def judge_of(rows, positives, parts=None, *, storage=None, **options):
    """Return what measures some candidates, with all videos in one part unless parts are given."""
    known = candidates_of(rows, positives)
    parts = [np.ones(len(positives), bool)] if parts is None else parts
    storage = storage or Storage(PLENTY, Path())
    return ClassJudge(read_class_table(known, parts, storage=storage, **options))


def loops(rows, positives, terms, videos=None):
    """Return the macro mAP of a mixture on some videos, or on all; a video may be named twice."""
    mixed = mixed_loops([rows[term.candidate] for term in terms], [term.weight for term in terms])
    videos = range(len(positives)) if videos is None else videos
    return float(macro_map_loops([mixed[v] for v in videos], [positives[v] for v in videos]))


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_parts_are_measured_apart_and_together_as_the_loops_do(case, data):
    rows, positives, terms = case
    is_in = np.array([True, False, *(data.draw(st.booleans()) for _ in positives[2:])])
    judge = judge_of(rows, positives, [is_in, ~is_in], block_values=data.draw(st.integers(1, 20)))

    scores = judge.scores(terms)

    assert scores == pytest.approx(
        (
            loops(rows, positives, terms, np.flatnonzero(is_in)),
            loops(rows, positives, terms, np.flatnonzero(~is_in)),
            loops(rows, positives, terms),
        ),
        abs=1e-12,
    )
    assert judge.chosen_by.num_videos == np.count_nonzero(is_in)
    num_positives = [judge.chosen_by.num_positives, judge.held_out.num_positives]
    assert sum(num_positives) == sum(map(len, positives))


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_each_addition_is_measured_in_memory_and_on_disk(tmp_path_factory, case, data):
    rows, positives, terms = case
    memory = data.draw(st.sampled_from([0, 100, PLENTY]))
    with closing(Storage(memory, tmp_path_factory.getbasetemp())) as storage:
        measure = judge_of(rows, positives, storage=storage, block_values=6).chosen_by

        for place in range(len(terms)):
            found = measure.scores_with(terms[:place], terms)
            expected = [loops(rows, positives, [*terms[:place], term]) for term in terms]
            assert found == pytest.approx(expected, abs=1e-12)
        assert measure.score([]) == 0


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_resample_repeats_the_videos_that_were_drawn_twice(case):
    rows, positives, terms = case
    measure = judge_of(rows, positives, block_values=6).chosen_by

    (found,) = measure.resampled([terms], resamples=3, seed=7)

    expected = []
    for index in range(3):
        drawn = np.random.default_rng([7, index]).integers(len(positives), size=len(positives))
        expected.append(loops(rows, positives, terms, drawn))
    shift = measure.score(terms) - np.mean(expected)
    assert found == pytest.approx(np.array(expected) + shift, abs=1e-12)


@given(
    st.lists(st.floats(0, 3) | st.sampled_from([0.0, 1e-300, 0.5, 0.5 + 2**-50]), min_size=1),
    st.data(),
)
def test_scores_are_counted_as_if_each_were_compared(scores, data):
    thresholds = sorted(data.draw(st.lists(st.sampled_from(scores), min_size=1)))

    found = counts_at_least(np.array(scores), np.array(thresholds))

    expected = [sum(score >= threshold for score in scores) for threshold in thresholds]
    assert found.tolist() == expected


def test_a_mixture_of_one_file_is_what_evaluate_measures():
    generator = np.random.default_rng(0)
    rows = generator.random((1, 40, 7)).astype(np.float32)
    positives = [set(generator.integers(7, size=2).tolist()) for _ in range(40)]
    known = candidates_of(rows, positives)

    def blocks():
        yield rows[0], known.labels

    expected = measure_rankings(blocks, 7).macro_map
    assert judge_of(rows, positives).scores([Term(0, 1.0)]).overall == expected
