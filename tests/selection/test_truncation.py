"""Bounds on what left-out classes could change, against what they do where they are known."""

from dataclasses import replace

import numpy as np
import pytest
from candidate_builders import candidates_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import gap_loops, mixed_loops

from ensemble_kit.predictions.rows import TopRows
from ensemble_kit.selection.scoring import Scorer, Term
from ensemble_kit.selection.search import Rules, Search
from ensemble_kit.selection.table import read_tables
from ensemble_kit.selection.truncation import gap_bounds, is_decided

K = 2
GREEDY = Rules(
    strategy="greedy", criterion="gain", limit=9, max_members=None, beam_width=1, start=()
)


class Matrix:
    """Rows in memory, in place of those in a file."""

    def __init__(self, rows):
        self.rows = rows

    def read(self, places):
        return self.rows[places]


def cut(known, index, depth):
    """Return the candidates with one that keeps its best classes only."""
    one = known.candidates[index]
    rows = one.predictions.rows(0, len(known.ids))
    order = np.argsort(-rows, axis=1, kind="stable")
    kept = order[:, :depth].astype(np.int32)
    values = np.take_along_axis(rows, order, axis=1)
    bounds = values[:, depth] if depth < rows.shape[1] else np.zeros(len(rows), np.float32)
    source = TopRows(Matrix(values[:, :depth]), Matrix(kept), bounds)
    changed = replace(one, predictions=replace(one.predictions, source=source))
    candidates = list(known.candidates)
    candidates[index] = changed
    return replace(known, candidates=tuple(candidates))


def scorer_of(known):
    (table,) = read_tables(known, [np.ones(len(known.ids), bool)], k=K, depth=3)
    return Scorer(table, K)


@st.composite
def cases(draw):
    num_videos, num_classes = draw(st.integers(1, 3)), draw(st.integers(4, 7))
    score = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.875])
    row = st.lists(score, min_size=num_classes, max_size=num_classes)
    one = st.lists(row, min_size=num_videos, max_size=num_videos)
    rows = draw(st.lists(one, min_size=2, max_size=3))
    classes = st.sets(st.integers(0, num_classes - 1), min_size=1, max_size=2)
    positives = draw(st.lists(classes, min_size=num_videos, max_size=num_videos))
    return rows, positives, draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_gap_of_all_classes_lies_between_the_bounds_of_those_kept(case):
    rows, positives, depth = case
    known = cut(cut(candidates_of(rows, positives), 0, depth), 1, depth + 1)
    terms = [Term(index, weight) for index, weight in zip(range(len(rows)), (1.0, 0.5, 3.0))]  # noqa: B905
    scorer = scorer_of(known)

    low, high = gap_bounds(scorer, terms)

    whole = gap_loops(mixed_loops(rows, [one.weight for one in terms]), positives, K)
    assert low - 1e-12 <= float(whole) <= high + 1e-12
    assert low - 1e-12 <= scorer.score(terms) <= high + 1e-12


TIED = [  # what was left out of the first may make a score of the second no better than a miss's
    [[0.0, 0.0, 0.125, 0.25], [0.125, 0.0, 0.0, 0.0]],
    [[0.5, 0.0, 0.25, 0.0], [0.25, 0.0, 0.0, 0.0]],
]


@settings(max_examples=30, deadline=None)
@example((TIED, [{0}, {0}], 1))
@given(cases())
def test_what_is_decided_is_what_all_classes_decide(case):
    rows, positives, depth = case
    whole = candidates_of(rows, positives, [3] * len(rows))
    known = cut(whole, 0, depth)

    def found(candidates):
        search = Search(scorer_of(candidates), candidates.candidates, [1.0] * len(rows), GREEDY)
        return search, search.run()

    search, chosen = found(known)
    measured = list(search.measured.values())
    if is_decided(search.measure, GREEDY, chosen, measured):
        assert found(whole)[1].members == chosen.members
    assert is_decided(search.measure, replace(GREEDY, strategy="beam"), chosen, measured) is None


def test_classes_that_cannot_reach_the_top_decide_nothing():
    high = [[0.75, 0.5, 0.125, 0.0625, 0.0], [0.5, 0.75, 0.0625, 0.0, 0.125]]
    low = [[0.5, 0.75, 0.0, 0.25, 0.125], [0.75, 0.5, 0.125, 0.25, 0.0]]
    known = cut(candidates_of([high, low], [{0}, {1}], [1, 1]), 1, 3)
    scorer = scorer_of(known)
    search = Search(scorer, known.candidates, [1.0, 1.0], GREEDY)
    chosen = search.run()

    assert chosen.members == (0,)
    assert gap_bounds(scorer, chosen.terms) == (1.0, 1.0)
    assert is_decided(scorer, GREEDY, chosen, list(search.measured.values())) is True


def test_a_label_that_was_left_out_may_decide():
    first = [[0.75, 0.5, 0.125, 0.0625]]
    second = [[0.0, 0.875, 0.25, 0.75]]
    known = cut(candidates_of([first, second], [{3}], [1, 1]), 1, 1)
    scorer = scorer_of(known)
    search = Search(scorer, known.candidates, [1.0, 1.0], GREEDY)
    chosen = search.run()

    low, high = gap_bounds(scorer, [Term(1, 1.0)])
    assert (low, high) == (0.0, pytest.approx(1 / 2))
    assert is_decided(scorer, GREEDY, chosen, list(search.measured.values())) is False
