"""mAP, AUC and lwlrap over whole rankings, against plain loops written from their definitions."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.ranking_metrics import measure_rankings

SCORES = [0.0, 0.25, 0.5, 1.0]  # few values, so that ties are everywhere


@st.composite
def scored_videos(draw):
    num_videos, num_classes = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    size = num_videos * num_classes
    scores = draw(st.lists(st.sampled_from(SCORES), min_size=size, max_size=size))
    labels = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    shape = (num_videos, num_classes)
    return np.array(scores, np.float32).reshape(shape), np.array(labels).reshape(shape)


def measured(scores, labels, step=3):
    lists = LabelLists.from_lists([np.flatnonzero(row) for row in labels])

    def blocks():
        for start in range(0, len(scores), step):
            rows = scores[start : start + step]
            yield rows, lists.rows(start, start + len(rows))

    return measure_rankings(blocks, scores.shape[1])


def average_precision(scores, labels):
    """Sum, over thresholds from high to low, of the rise in recall times the precision."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        recall = sum(chosen) / sum(labels)
        total += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return total


def area(scores, labels):
    pairs = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for (one, has), (other, has_not) in product(zip(scores, labels, strict=True), repeat=2)
        if has and not has_not
    ]
    return sum(pairs) / len(pairs)


def mean(values):
    return sum(values) / len(values) if values else 0.0


@settings(max_examples=150, deadline=None)
@given(scored_videos())
def test_every_metric_is_that_of_the_loops(case):
    scores, labels = case
    columns = list(zip(scores.T.tolist(), labels.T.tolist(), strict=True))
    precisions = [average_precision(*column) for column in columns if any(column[1])]
    areas = [area(*column) for column in columns if any(column[1]) and not all(column[1])]
    of_labels = [
        sum(other for score, other in zip(row, has, strict=True) if score >= row[place])
        / sum(score >= row[place] for score in row)
        for row, has in zip(scores.tolist(), labels.tolist(), strict=True)
        for place in np.flatnonzero(has)
    ]

    found = measured(scores, labels)

    assert found.macro_map == pytest.approx(mean(precisions), abs=1e-12)
    assert found.auc == pytest.approx(mean(areas), abs=1e-12)
    assert found.lwlrap == pytest.approx(mean(of_labels), abs=1e-12)


def test_d_prime_is_the_distance_of_two_normal_distributions_with_that_area():
    generator = np.random.default_rng(0)
    labels = np.repeat([True, False], 20_000)[:, None]
    scores = generator.normal(size=labels.shape) + 1.5 * labels  # a distance of 1.5 deviations

    found = measured(scores, labels, step=10_000)

    assert found.d_prime == pytest.approx(1.5, abs=4 * 1.5 / sqrt(20_000))


@pytest.mark.parametrize(("scores", "area"), [([0.9, 0.1], 1.0), ([0.1, 0.9], 0.0)])
def test_a_ranking_without_any_doubt_has_no_finite_d_prime(scores, area):
    found = measured(np.array(scores)[:, None], np.array([[True], [False]]))

    assert (found.auc, found.d_prime) == (area, None)


def test_of_no_videos_every_mean_is_0():
    found = measured(np.empty((0, 3)), np.empty((0, 3), np.bool_))

    assert (found.macro_map, found.auc, found.d_prime, found.lwlrap) == (0, 0, None, 0)
