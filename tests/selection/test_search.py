"""Every strategy against its rule as loops over all the ensembles it could measure."""

from itertools import chain, combinations

import pytest
from candidate_builders import FIRST_COUNTS_MORE, SearchCase, search_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.errors import SelectionError, SizeLimitError


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
@given(search_cases(), st.integers(1, 3))
def test_a_beam_keeps_the_best_ensembles_of_each_number_of_members(case, width):
    search = case.search("beam", beam_width=width)

    chosen = search.run()

    assert chosen.members == beam_loops(case, width)
    assert chosen.score == pytest.approx(float(case.gap(chosen.members)), abs=1e-12)
    assert [one.members for one in chosen.additions] == [
        chosen.members[:size] for size in range(1, len(chosen.terms) + 1)
    ]
    for key, one in search.measured.items():
        assert key == tuple(sorted(one.members))
        assert one.score == pytest.approx(float(case.gap(key)), abs=1e-12)
        assert one.num_bytes == case.num_bytes(key) <= case.limit


@settings(max_examples=30, deadline=None)
@given(search_cases())
def test_greedy_is_a_beam_of_one(case):
    assert case.search("greedy").run().members == beam_loops(case, 1)


@settings(max_examples=30, deadline=None)
@given(search_cases(), st.integers(1, 6))
def test_with_replacement_the_best_of_the_first_additions_is_kept(case, most):
    chosen = case.search("replacement", max_members=most).run()

    assert chosen.members == beam_loops(case, 1, may_repeat=True, most=most)
    assert chosen.num_bytes == case.num_bytes(chosen.members)


@settings(max_examples=30, deadline=None)
@given(search_cases(), st.integers(1, 4))
def test_an_exhaustive_search_finds_the_optimum(case, most):
    places = range(len(case.rows))
    every = chain.from_iterable(combinations(places, size) for size in range(1, most + 1))
    fitting = [members for members in every if case.fits(members)]

    search = case.search("exhaustive", max_members=most)
    chosen = search.run()

    assert chosen.members == min(fitting, key=case.order)
    assert search.measured.keys() == set(fitting)


@settings(max_examples=30, deadline=None)
@given(search_cases())
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


def right_for(*videos):
    """Four videos, each with its own class; a candidate that knows some of them."""
    return [[0.75 if c == v and v in videos else 0.125 for c in range(5)] for v in range(4)]


def made(*known, sizes=None, limit=100):
    sizes = sizes or [10] * len(known)
    return SearchCase([right_for(*videos) for videos in known], [{0}, {1}, {2}, {3}], sizes, limit)


def test_what_is_counted_twice_takes_its_bytes_once():
    case = SearchCase(FIRST_COUNTS_MORE, [{0}, {1}], [7, 11], 100)

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
