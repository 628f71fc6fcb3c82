"""The challenge's mAP of mixtures against plain loops over all of their probabilities."""

import numpy as np
import pytest
from candidate_builders import candidates_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import map_loops, mixed_loops, pool_loops

from ensemble_kit.metrics import mean_average_precision
from ensemble_kit.selection.judging import GapJudge
from ensemble_kit.selection.scoring import Term
from ensemble_kit.selection.table import read_tables
from ensemble_kit.selection.top_class_scoring import TopClassJudge


@st.composite
def cases(draw):
    """Few distinct scores, so that ties are everywhere, and constant columns."""
    num_videos, num_classes = draw(st.integers(2, 6)), draw(st.integers(3, 9))
    score = st.sampled_from([0.0, 0.0, 0.125, 0.25, 0.75])
    row = st.lists(score, min_size=num_classes, max_size=num_classes)
    one = st.lists(row, min_size=num_videos, max_size=num_videos)
    rows = draw(st.lists(one, min_size=1, max_size=3))
    if draw(st.booleans()):
        rows = [[[0.5, *row[1:]] for row in one] for one in rows]
    classes = st.sets(st.integers(0, num_classes - 1), max_size=3)
    positives = draw(st.lists(classes, min_size=num_videos, max_size=num_videos))
    order = draw(st.permutations(range(len(rows))))
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=3, max_size=3))
    terms = [Term(*pair) for pair in zip(order, weights, strict=False)]
    return rows, positives, terms, draw(st.integers(1, 3)), draw(st.integers(1, 4))


def judge_of(rows, positives, parts, k, **options):
    tables = read_tables(candidates_of(rows, positives), parts, k=k, **options)
    return TopClassJudge.of(GapJudge.of(tables, k))


def mixed(rows, terms):
    return mixed_loops([rows[term.candidate] for term in terms], [term.weight for term in terms])


def loops(rows, positives, terms, k, videos=None):
    """Return the mAP of a mixture on some videos, or on all."""
    scores = mixed(rows, terms)
    videos = range(len(positives)) if videos is None else videos
    return float(map_loops([scores[v] for v in videos], [positives[v] for v in videos], k))


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_parts_are_measured_apart_and_together_as_the_loops_do(case, data):
    rows, positives, terms, k, depth = case
    is_in = np.array([True, False, *(data.draw(st.booleans()) for _ in positives[2:])])
    block_videos = data.draw(st.integers(1, 3))
    judge = judge_of(
        rows, positives, [is_in, ~is_in], k, depth=depth, read_values=9, block_videos=block_videos
    )

    scores = judge.scores(terms)

    assert scores == pytest.approx(
        (
            loops(rows, positives, terms, k, np.flatnonzero(is_in)),
            loops(rows, positives, terms, k, np.flatnonzero(~is_in)),
            loops(rows, positives, terms, k),
        ),
        abs=1e-12,
    )
    found = judge.chosen_by.scores_with(terms[:1], terms)
    expected = [
        loops(rows, positives, [terms[0], term], k, np.flatnonzero(is_in)) for term in terms
    ]
    assert found == pytest.approx(expected, abs=1e-12)
    assert judge.scores([]) == (0, 0, 0)


def resampled_loops(rows, positives, terms, k, drawn):
    """Rank the pairs of each class; one of a video that was drawn w times stands w times there."""
    pool = pool_loops(mixed(rows, terms), k)
    precisions = []
    for wanted in set().union(*positives):
        num_positives = sum(drawn.count(v) for v, one in enumerate(positives) if wanted in one)
        pairs = hits = total = 0
        for _, video, _ in sorted((p for p in pool if p[2] == wanted), key=lambda p: -p[0]):
            count = drawn.count(video)
            pairs += count
            if wanted in positives[video]:
                hits += count
                total += count * hits / max(pairs, 1)
        if num_positives:
            precisions.append(total / num_positives)
    return sum(precisions) / len(precisions) if precisions else 0


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_resample_counts_a_video_as_often_as_it_was_drawn(case):
    rows, positives, terms, k, depth = case
    judge = judge_of(rows, positives, [np.ones(len(positives), bool)], k, depth=depth)

    (found,) = judge.chosen_by.resampled([terms], resamples=3, seed=7)

    expected = []
    for index in range(3):
        drawn = np.random.default_rng([7, index]).integers(len(positives), size=len(positives))
        expected.append(resampled_loops(rows, positives, terms, k, drawn.tolist()))
    shift = judge.chosen_by.score(terms) - np.mean(expected)
    assert found == pytest.approx(np.array(expected) + shift, abs=1e-12)


def test_a_mixture_of_one_file_is_what_evaluate_measures():
    generator = np.random.default_rng(0)
    rows = generator.random((1, 60, 50)).astype(np.float32)
    positives = [set(generator.integers(50, size=3).tolist()) for _ in range(60)]
    judge = judge_of(rows, positives, [np.ones(60, bool)], 4)
    labels = np.array([[index in one for index in range(50)] for one in positives])

    assert judge.chosen_by.score([Term(0, 1.0)]) == mean_average_precision(rows[0], labels, k=4)
    assert judge.chosen_by.num_positives == labels.sum()
