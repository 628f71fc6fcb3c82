"""Every strategy against its rule as loops over all the ensembles it could measure."""

from itertools import chain, combinations

import numpy as np
import pytest
from candidate_builders import candidates_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gap_loops, mixed_loops

from ensemble_kit.errors import SelectionError, SizeLimitError
from ensemble_kit.selection.mixing import optimised
from ensemble_kit.selection.scoring import Scorer, Term
from ensemble_kit.selection.search import Rules, Search
from ensemble_kit.selection.table import read_tables

K = 2


class Case:
    """Some candidates, and the GAP of any of their ensembles by the loops."""

    def __init__(self, rows, positives, sizes, limit):
        self.rows, self.positives, self.sizes, self.limit = rows, positives, sizes, limit
        self.known = candidates_of(rows, positives, sizes)
        self.gaps = {}

    def gap(self, members):
        key = tuple(sorted(members))
        if key not in self.gaps:
            mixed = mixed_loops([self.rows[index] for index in key], [1] * len(key))
            self.gaps[key] = gap_loops(mixed, self.positives, K)
        return self.gaps[key]

    def num_bytes(self, members):
        return sum(self.sizes[index] for index in set(members))

    def order(self, members):
        """What decides: the GAP, then bytes, then names, which are in order of place."""
        return -self.gap(members), self.num_bytes(members), members

    def fits(self, members):
        return self.num_bytes(members) <= self.limit

    def search(self, strategy, **changes):
        rules = {
            "strategy": strategy,
            "criterion": "gain",
            "limit": self.limit,
            "max_members": None,
            "beam_width": 1,
            "start": (),
        }
        (table,) = read_tables(self.known, [np.ones(len(self.positives), bool)], k=K)
        weights = [1.0] * len(self.rows)
        return Search(Scorer(table, K), self.known.candidates, weights, Rules(**rules | changes))


@st.composite
def cases(draw):
    """Eighths as scores, so that sums are exact; one candidate fits at least."""
    num_videos, num_classes = draw(st.integers(2, 4)), draw(st.integers(3, 5))
    score = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.875])
    row = st.lists(score, min_size=num_classes, max_size=num_classes)
    one = st.lists(row, min_size=num_videos, max_size=num_videos)
    rows = draw(st.lists(one, min_size=2, max_size=4))
    classes = st.sets(st.integers(0, num_classes - 1), min_size=1, max_size=2)
    positives = draw(st.lists(classes, min_size=num_videos, max_size=num_videos))
    sizes = draw(st.lists(st.sampled_from([2, 3, 5]), min_size=len(rows), max_size=len(rows)))
    return Case(rows, positives, sizes, draw(st.integers(5, 13)))


def beam_loops(case, width, *, may_repeat=False, most=9):
    """The best ensemble, and how many ensembles of each number of members were followed."""
    best, level = None, [()]
    for _ in range(most):
        found = {}
        for members in level:
            for index in range(len(case.rows)):
                longer = (*members, index)
                if (index not in members or may_repeat) and case.fits(longer):
                    found.setdefault(tuple(sorted(longer)), longer)
        level = sorted(found.values(), key=case.order)[:width]
        if level and (best is None or case.gap(level[0]) > case.gap(best)):
            best = level[0]
        elif not may_repeat:
            break
    return best


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 3))
def test_a_beam_keeps_the_best_ensembles_of_each_number_of_members(case, width):
    search = case.search("beam", beam_width=width)

    chosen = search.run()

    assert chosen.members == beam_loops(case, width)
    assert chosen.gap == pytest.approx(float(case.gap(chosen.members)), abs=1e-12)
    assert [one.members for one in chosen.additions] == [
        chosen.members[:size] for size in range(1, len(chosen.terms) + 1)
    ]
    for key, one in search.measured.items():
        assert key == tuple(sorted(one.members))
        assert one.gap == pytest.approx(float(case.gap(key)), abs=1e-12)
        assert one.num_bytes == case.num_bytes(key) <= case.limit


@settings(max_examples=30, deadline=None)
@given(cases())
def test_greedy_is_a_beam_of_one(case):
    assert case.search("greedy").run().members == beam_loops(case, 1)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 6))
def test_with_replacement_the_best_of_the_first_additions_is_kept(case, most):
    chosen = case.search("replacement", max_members=most).run()

    assert chosen.members == beam_loops(case, 1, may_repeat=True, most=most)
    assert chosen.num_bytes == case.num_bytes(chosen.members)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 4))
def test_an_exhaustive_search_finds_the_optimum(case, most):
    places = range(len(case.rows))
    every = chain.from_iterable(combinations(places, size) for size in range(1, most + 1))
    fitting = [members for members in every if case.fits(members)]

    search = case.search("exhaustive", max_members=most)
    chosen = search.run()

    assert chosen.members == min(fitting, key=case.order)
    assert search.measured.keys() == set(fitting)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_gain_for_each_byte_decides_after_the_best_single(case):
    chosen = case.search("greedy", criterion="gain-per-byte").run()

    members = (min((one for one in range(len(case.rows)) if case.fits((one,))),
                   key=lambda one: case.order((one,))),)  # fmt: skip
    while True:
        longer = [
            (*members, index)
            for index in range(len(case.rows))
            if index not in members
            and case.fits((*members, index))
            and case.gap((*members, index)) > case.gap(members)
        ]
        if not longer:
            break
        gained = [(case.gap(one) - case.gap(members)) / case.sizes[one[-1]] for one in longer]
        most = max(gained)
        equal = [one for one, gain in zip(longer, gained, strict=True) if gain == most]
        members = min(equal, key=lambda one: (case.num_bytes(one), one))
    assert chosen.members == members


def test_of_two_gains_the_one_that_costs_fewer_bytes_for_its_size_is_taken():
    case = made((0, 1), (2, 3), (2,), sizes=[10, 90, 10])

    by_gain = case.search("greedy", start=(0,)).run()
    by_bytes = case.search("greedy", start=(0,), criterion="gain-per-byte").run()

    assert case.gap((0, 1)) > case.gap((0, 2)) > case.gap((0,))
    assert by_gain.members == (0, 1)
    assert by_bytes.members == (0, 2)


# Of the two classes the first video's is the first and the second's the second. Alone and in their
# mean one of them is taken for the other; not where the first candidate counts twice.
FIRST_COUNTS_MORE = [[[0.4, 0.1], [0.4, 0.3]], [[0.1, 0.5], [0.1, 0.5]]]


def right_for(*videos):
    """Four videos, each with its own class; a candidate that knows some of them."""
    return [[0.75 if c == v and v in videos else 0.125 for c in range(5)] for v in range(4)]


def made(*known, sizes=None, limit=100):
    sizes = sizes or [10] * len(known)
    return Case([right_for(*videos) for videos in known], [{0}, {1}, {2}, {3}], sizes, limit)


def test_what_is_counted_twice_takes_its_bytes_once():
    case = Case(FIRST_COUNTS_MORE, [{0}, {1}], [7, 11], 100)

    chosen = case.search("replacement", max_members=5).run()

    assert sorted(chosen.members) == [0, 0, 1]
    assert chosen.num_bytes == 18


def test_members_to_start_with_stay_and_are_the_first_steps():
    case = made((0, 1), (2,), (3,), ())

    for strategy in ("greedy", "beam", "exhaustive", "replacement"):
        chosen = case.search(strategy, start=(3, 1), max_members=4).run()

        assert chosen.members[:2] == (3, 1)
        assert set(chosen.members) == {0, 1, 2, 3}
        assert [one.members for one in chosen.additions][:2] == [(3,), (3, 1)]


def test_no_more_members_than_asked_for():
    case = made((0, 1), (2,), (3,))

    for strategy in ("greedy", "beam", "exhaustive", "replacement"):
        assert len(case.search(strategy, max_members=2).run().terms) == 2


def test_members_to_start_with_that_do_not_fit_are_refused():
    with pytest.raises(SizeLimitError) as caught:
        made((0,), (1,), limit=15).search("greedy", start=(0, 1)).run()

    assert str(caught.value) == (
        "The members to start with (candidate0, candidate1) do not fit in 15 bytes.\n"
        "Raise --max-size, or name fewer."
    )


def test_an_exhaustive_search_of_too_many_ensembles_is_refused():
    case = made(*[()] * 15)

    with pytest.raises(SelectionError) as caught:
        case.search("exhaustive").run()

    assert str(caught.value) == (
        "There are 32,768 ensembles of 15 candidates; an exhaustive search measures 20,000 at "
        "most.\n"
        "Limit --max-members, leave candidates out with --exclude, or use --strategy beam."
    )
    assert len(case.search("exhaustive", max_members=1).run().terms) == 1


@settings(max_examples=30, deadline=None)
@given(cases())
def test_optimised_coefficients_are_never_worse_and_sum_alike(case):
    search = case.search("greedy")
    chosen = search.run()

    terms = optimised(search.scorer, chosen.terms, chosen.gap)

    assert [term.candidate for term in terms] == list(chosen.members)
    assert sum(term.weight for term in terms) == pytest.approx(len(terms))
    assert all(term.weight > 0 for term in terms)
    assert search.scorer.gap(terms) >= chosen.gap - 1e-12


def test_coefficients_stay_where_no_step_raises_the_gap():
    # Three members, for two could come back to equal coefficients by the second one's step.
    rows = [
        [[0.875, 0.875, 0.75], [0.625, 0.875, 0.125], [0.0, 0.5, 0.75]],
        [[0.875, 0.75, 0.75], [0.625, 0.75, 0.5], [0.875, 0.875, 0.25]],
        [[0.75, 0.125, 0.125], [0.5, 0.875, 0.875], [0.5, 0.0, 0.875]],
    ]
    scorer = Case(rows, [{0}, {2}, {2}], [1, 1, 1], 3).search("greedy").scorer
    terms = [Term(0, 1.0), Term(1, 1.0), Term(2, 1.0)]

    assert optimised(scorer, terms, scorer.gap(terms)) == terms


def test_coefficients_move_to_where_both_videos_are_right():
    case = Case(FIRST_COUNTS_MORE, [{0}, {1}], [1, 1], 2)
    scorer = case.search("greedy").scorer
    terms = [Term(0, 1.0), Term(1, 1.0)]

    first, second = optimised(scorer, terms, scorer.gap(terms))

    assert first.weight > 1 > second.weight
    assert scorer.gap([first, second]) > scorer.gap(terms)
