"""The table of what can matter of the candidates, against all of their probabilities."""

from contextlib import closing

import numpy as np
import pytest
from candidate_builders import MISSING, candidates_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import gap_loops, mixed_loops

from ensemble_kit.selection.judging import GapJudge
from ensemble_kit.selection.scoring import Extension, Scorer, Term
from ensemble_kit.selection.storage import Storage
from ensemble_kit.selection.table import read_tables


@st.composite
def cases(draw):
    """Few distinct scores, so that ties are everywhere, constant columns and many zeros."""
    num_videos, num_classes = draw(st.integers(1, 5)), draw(st.integers(3, 11))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        scores = [0.0, 0.0, 0.0, 0.125, 0.25, 0.75]
        score = st.sampled_from(scores + [MISSING] * 3 * draw(st.booleans()))
        row = st.lists(score, min_size=num_classes, max_size=num_classes)
        rows.append(draw(st.lists(row, min_size=num_videos, max_size=num_videos)))
    constant = draw(st.sampled_from([None, 0.5]))
    if constant is not None:
        rows = [[[constant, *row[1:]] for row in one] for one in rows]
    classes = st.sets(st.integers(0, num_classes - 1), max_size=3)
    positives = draw(st.lists(classes, min_size=num_videos, max_size=num_videos))
    order = draw(st.permutations(range(len(rows))))[: draw(st.integers(1, 4))]
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=4, max_size=4))
    terms = [Term(index, weight) for index, weight in zip(order, weights, strict=False)]
    return rows, positives, terms, draw(st.integers(1, 3)), draw(st.integers(1, 4))


def test_many_blocks_measure_what_one_does():
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 9, (3, 23, 11)) / 8
    positives = [set(generator.integers(11, size=2).tolist()) for _ in range(23)]
    known = candidates_of(rows.clip(0, 1), positives)
    parts = [np.ones(23, bool)]
    (whole,) = read_tables(known, parts, k=2, depth=2)
    (parted,) = read_tables(known, parts, k=2, depth=2, read_values=22, block_videos=3)
    once, again = Scorer(whole, 2), Scorer(parted, 2, read_values=22)

    assert (len(whole.blocks), len(parted.blocks)) == (1, 6)
    for terms in ([Term(0, 1.0)], [Term(2, 0.5), Term(1, 3.0)], [Term(i, 1.0) for i in range(3)]):
        assert again.score(terms) == once.score(terms)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_blocks_of_any_size_in_memory_or_on_disk_have_the_same_gaps(tmp_path_factory, case, data):
    rows, positives, terms, k, depth = case
    known = candidates_of(rows, positives)
    is_in = [np.ones(len(positives), bool)]
    (whole,) = read_tables(known, is_in, k=k, depth=depth)
    memory = data.draw(st.sampled_from([0, 1000, 3000]))
    storage = Storage(memory, tmp_path_factory.getbasetemp())
    with closing(storage):
        (parted,) = read_tables(
            known,
            is_in,
            k=k,
            depth=depth,
            storage=storage,
            read_values=data.draw(st.integers(1, 30)),
            block_videos=data.draw(st.integers(1, 3)),
        )
        once = Scorer(whole, k)
        again = Scorer(
            parted,
            k,
            pool_bytes=data.draw(st.integers(1, 999)),
            sorted_together=data.draw(st.sampled_from([2, 5, 128])),
        )

        assert memory or all(block.is_stored for block in parted.blocks)
        mixtures = once.mixed([]), again.mixed([])
        for term in terms:
            expected = Extension(once, mixtures[0], terms).gaps(terms)
            assert Extension(again, mixtures[1], terms).gaps(terms) == expected
            mixtures = [each.mixed((*mixtures[0].terms, term)) for each in (once, again)]


@pytest.mark.parametrize("together", [2, 128])
def test_a_tie_at_the_cut_is_settled_in_rows_that_are_sorted_in_parts(together):
    rows = [[[0.5, 0.5, 0.1, 0.2, 0.3]], [[0.0, 0.0, 0.4, 0.5, 0.6]]]
    for label, expected in ((1, 0.0), (0, 1.0)):  # of equal scores the lower class ranks first
        (table,) = read_tables(candidates_of(rows, [{label}]), [np.ones(1, bool)], k=1, depth=9)
        scorer = Scorer(table, 1, sorted_together=together)
        extension = Extension(scorer, scorer.mixed([]), [Term(0, 1.0), Term(1, 1.0)])

        assert extension.gap(Term(0, 1.0)) == expected


def dense_gap(rows, positives, terms, k):
    members = [rows[term.candidate] for term in terms]
    return float(gap_loops(mixed_loops(members, [one.weight for one in terms]), positives, k))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_gap_is_that_of_all_probabilities_however_few_are_kept(case):
    rows, positives, terms, k, depth = case
    known = candidates_of(rows, positives)
    (table,) = read_tables(known, [np.ones(len(positives), bool)], k=k, depth=depth)
    scorer = Scorer(table, k)

    assert scorer.score(terms) == pytest.approx(dense_gap(rows, positives, terms, k), abs=1e-12)

    mixture = scorer.mixed([])
    for term in terms:  # as a search adds them
        extension = Extension(scorer, mixture, terms)
        for other in terms:
            expected = dense_gap(rows, positives, [*mixture.terms, other], k)
            assert extension.gap(other) == pytest.approx(expected, abs=1e-12)
        mixture = scorer.mixed((*mixture.terms, term))


def test_a_part_without_the_last_videos_read_is_measured():
    rows, positives = [[[0.5, 0.25, 0.0], [0.25, 0.5, 0.0], [0.5, 0.0, 0.0]]], [{0}, {1}, {1}]
    is_in = np.array([True, True, False])

    tables = read_tables(
        candidates_of(rows, positives), [is_in, ~is_in], k=1, read_values=3, block_videos=1
    )

    assert GapJudge.of(tables, 1).scores([Term(0, 1.0)]) == (1.0, 0.0, pytest.approx(2 / 3))


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_parts_are_measured_apart_and_together(case, data):
    rows, positives, terms, k, depth = case
    known = candidates_of(rows, positives)
    is_in = np.array(data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))[: len(positives)]
    assume(is_in.any() and not is_in.all())

    tables = read_tables(known, [is_in, ~is_in], k=k, depth=depth)
    gaps = GapJudge.of(tables, k).scores(terms)

    for part, found in ((is_in, gaps.chosen_by), (~is_in, gaps.held_out)):
        of_part = [[row for row, inside in zip(one, part, strict=True) if inside] for one in rows]
        labels = [one for one, inside in zip(positives, part, strict=True) if inside]
        assert found == pytest.approx(dense_gap(of_part, labels, terms, k), abs=1e-12)
    assert gaps.overall == pytest.approx(dense_gap(rows, positives, terms, k), abs=1e-12)
