"""The challenge's metrics against plain loops, ties and missing predictions included."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import gap_loops, hit_at_one_loops, map_loops, perr_loops

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.metrics import (
    Metrics,
    MetricsAccumulator,
    global_average_precision,
    hit_at_one,
    mean_average_precision,
    measure,
    precision_at_equal_recall_rate,
    top_classes,
)

FEW_SCORES = [-np.inf, -1.0, 0.0, 0.25, 0.5, 1.0]  # few values, so that ties are everywhere


@st.composite
def scored_videos(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.bool_], int]:
    num_videos, num_classes = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    score = st.sampled_from(FEW_SCORES)
    size = num_videos * num_classes
    scores = draw(st.lists(score, min_size=size, max_size=size))
    positives = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    shape = (num_videos, num_classes)
    return (
        np.array(scores, np.float32).reshape(shape),
        np.array(positives).reshape(shape),
        draw(st.integers(1, 11)),
    )


def as_sets(labels: NDArray[np.bool_]) -> list[set[int]]:
    return [set(np.flatnonzero(row).tolist()) for row in labels]


@settings(max_examples=150, deadline=None)
@given(scored_videos())
def test_every_metric_is_that_of_the_loops(case):
    scores, labels, k = case

    metrics = measure(scores, labels, k=k)

    loops = (scores.tolist(), as_sets(labels))
    assert metrics.gap == pytest.approx(float(gap_loops(*loops, k)), abs=1e-12)
    assert metrics.hit_at_1 == pytest.approx(float(hit_at_one_loops(*loops)), abs=1e-12)
    assert metrics.perr == pytest.approx(float(perr_loops(*loops)), abs=1e-12)
    assert metrics.map == pytest.approx(float(map_loops(*loops, k)), abs=1e-12)
    assert metrics.videos == len(scores)
    assert metrics.positives == labels.sum()
    assert metrics.classes_with_positives == labels.any(axis=0).sum()


@settings(max_examples=50, deadline=None)
@given(scored_videos(), st.data())
def test_batches_give_the_very_number_of_all_at_once(case, data):
    scores, labels, k = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(scores)), max_size=3)))

    accumulator = MetricsAccumulator(num_classes=scores.shape[1], k=k)
    for start, stop in zip([0, *cuts], [*cuts, len(scores)], strict=True):
        accumulator.add(scores[start:stop], labels[start:stop])

    assert accumulator.result() == measure(scores, labels, k=k)


@settings(max_examples=50, deadline=None)
@given(scored_videos())
def test_label_lists_give_the_very_number_of_dense_labels(case):
    scores, labels, k = case

    lists = LabelLists.from_lists([sorted(one) for one in as_sets(labels)])

    assert measure(scores, lists, k=k) == measure(scores, labels, k=k)


def test_many_blocks_and_class_groups_give_the_number_of_the_loops():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 40, (23, 211)).astype(np.float64)  # 5 videos a block
    labels = generator.random((23, 211)) < 0.05

    loops = (scores.tolist(), as_sets(labels))
    dense, listed = (MetricsAccumulator(num_classes=211, k=3, block_values=1000) for _ in range(2))
    dense.add(scores, labels)
    listed.add(scores, LabelLists.from_lists(map(sorted, loops[1])))

    metrics = dense.result()

    assert metrics.gap == pytest.approx(float(gap_loops(*loops, 3)), abs=1e-12)
    assert metrics.perr == pytest.approx(float(perr_loops(*loops)), abs=1e-12)
    assert metrics.map == pytest.approx(float(map_loops(*loops, 3)), abs=1e-12)
    assert listed.result() == metrics


def test_single_metrics_are_the_fields_of_all_of_them():
    generator = np.random.default_rng(0)
    scores, labels = generator.random((5, 7)), generator.random((5, 7)) < 0.4

    metrics = measure(scores, labels, k=3)

    assert global_average_precision(scores, labels, k=3) == metrics.gap
    assert hit_at_one(scores, labels) == metrics.hit_at_1
    assert precision_at_equal_recall_rate(scores, labels) == metrics.perr
    assert mean_average_precision(scores, labels, k=3) == metrics.map


def test_a_perfect_model_scores_below_one_where_a_video_has_more_than_k_labels():
    labels = np.array([[True, True, True, False]])

    assert global_average_precision(labels.astype(float), labels, k=3) == 1.0
    assert global_average_precision(labels.astype(float), labels, k=2) == pytest.approx(2 / 3)


def test_tied_scores_rank_by_video_then_by_class():
    tied = np.full((2, 3), 0.5)

    first, last = np.zeros((2, 3), bool), np.zeros((2, 3), bool)
    first[0, 0] = last[1, 2] = True

    assert global_average_precision(tied, first) == 1.0
    assert global_average_precision(tied, last) == pytest.approx(1 / 6)
    assert global_average_precision(tied, last, k=2) == 0.0  # class 2 is not among the two best
    assert hit_at_one(tied, first) == 0.5


def test_classes_that_are_not_predicted_are_never_hits():
    nothing = np.full((2, 3), -np.inf)

    metrics = measure(nothing, np.ones((2, 3), bool))

    assert (metrics.gap, metrics.hit_at_1, metrics.perr, metrics.map) == (0, 0, 0, 0)


def test_without_positives_every_metric_is_zero():
    metrics = measure(np.ones((2, 3)), np.zeros((2, 3), bool))

    assert metrics.as_dict() == {
        "k": 20,
        "gap": 0.0,
        "hit_at_1": 0.0,
        "perr": 0.0,
        "map": 0.0,
        "videos": 2,
        "positives": 0,
        "classes_with_positives": 0,
    }


def test_without_videos_every_metric_is_zero():
    empty = MetricsAccumulator(num_classes=3, k=2)

    nothing_added = empty.result()
    empty.add(np.empty((0, 3)), np.empty((0, 3), bool))

    assert (
        nothing_added
        == empty.result()
        == Metrics(
            k=2, gap=0, hit_at_1=0, perr=0, map=0, videos=0, positives=0, classes_with_positives=0
        )
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_scores_of_any_type_are_ranked(dtype):
    scores, labels = np.array([[0, 3, 1]], dtype), np.array([[0, 1, 1]])

    assert global_average_precision(scores, labels, k=2) == 1.0


def test_top_classes_are_best_first_and_end_where_nothing_is_predicted():
    classes, scores = top_classes(np.array([[0.5, 1.0, 0.5, 0.7], [-np.inf, -np.inf, 0.2, 0]]), 3)

    assert classes[0].tolist() == [1, 3, 0]
    assert scores[0].tolist() == [1.0, 0.7, 0.5]
    assert classes[1, :2].tolist() == [2, 3]
    assert scores[1].tolist() == [0.2, 0.0, -np.inf]


@pytest.mark.parametrize("place", range(7))
def test_nan_is_refused_wherever_it_is(place):
    scores = np.linspace(0.1, 0.9, 14).reshape(2, 7)
    scores[1, place] = np.nan

    with pytest.raises(ValueError, match=r"^a score is NaN$"):
        global_average_precision(scores, np.zeros((2, 7), bool), k=1)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.ones(3), np.ones(3), "probabilities must be (N, C), not (3,)"),
        (np.ones((2, 3)), np.ones((2, 4)), "labels are of shape (2, 4), probabilities of (2, 3)"),
        (
            np.ones((2, 3)),
            LabelLists.from_lists([[1]]),
            "labels are of shape (1, 3), probabilities of (2, 3)",
        ),
    ],
)
def test_shapes_that_do_not_agree_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        global_average_precision(scores, labels)


def test_an_accumulator_refuses_other_widths_and_counts_below_one():
    with pytest.raises(ValueError, match=r"^probabilities must be \(n, 4\), not \(2, 3\)$"):
        MetricsAccumulator(num_classes=4).add(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"^num_classes and k must be at least 1, not 4 and 0$"):
        MetricsAccumulator(num_classes=4, k=0)
