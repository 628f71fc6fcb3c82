"""Optimised coefficients: never worse than equal ones, and moved where that helps."""

import pytest
from candidate_builders import FIRST_COUNTS_MORE, K, SearchCase, search_cases
from hypothesis import given, settings
from reference import gap_loops, mixed_loops

from ensemble_kit.selection.mixing import optimised
from ensemble_kit.selection.scoring import Term


@settings(max_examples=30, deadline=None)
@given(search_cases())
def test_optimised_coefficients_are_never_worse_and_sum_alike(case):
    search = case.search("greedy")
    chosen = search.run()

    terms = optimised(search.measure, chosen.terms, chosen.score)

    assert [term.candidate for term in terms] == list(chosen.members)
    assert sum(term.weight for term in terms) == pytest.approx(len(terms))
    assert all(term.weight > 0 for term in terms)
    assert search.measure.score(terms) >= chosen.score - 1e-12


def test_coefficients_stay_where_no_step_raises_the_gap():
    # Three members, for two could come back to equal coefficients by the second one's step.
    rows = [
        [[0.875, 0.875, 0.75], [0.625, 0.875, 0.125], [0.0, 0.5, 0.75]],
        [[0.875, 0.75, 0.75], [0.625, 0.75, 0.5], [0.875, 0.875, 0.25]],
        [[0.75, 0.125, 0.125], [0.5, 0.875, 0.875], [0.5, 0.0, 0.875]],
    ]
    scorer = SearchCase(rows, [{0}, {2}, {2}], [1, 1, 1], 3).search("greedy").measure
    terms = [Term(0, 1.0), Term(1, 1.0), Term(2, 1.0)]

    assert optimised(scorer, terms, scorer.score(terms)) == terms


def test_coefficients_move_to_where_both_videos_are_right():
    case = SearchCase(FIRST_COUNTS_MORE, [{0}, {1}], [1, 1], 2)
    scorer = case.search("greedy").measure
    terms = [Term(0, 1.0), Term(1, 1.0)]

    first, second = optimised(scorer, terms, scorer.score(terms))

    assert first.weight > 1 > second.weight
    assert scorer.score([first, second]) > scorer.score(terms)


def test_coefficients_reach_the_best_ratio_though_a_large_step_leaps_over_it():
    # best from about 1.02 to 1.4: the first factor, 1.5, brings nothing, and must not be taken
    rows = [
        [[0.75, 0.625, 0.5], [0.25, 0.375, 0.125]],
        [[0.125, 0.125, 0.25], [0.75, 0.625, 0.875]],
    ]
    ratios = [0.25, 0.5, 0.8, 1, 1.1, 1.2, 1.5, 2, 4, 8]
    gaps = [float(gap_loops(mixed_loops(rows, [ratio, 1]), [{1}, {1}], K)) for ratio in ratios]
    measure = SearchCase(rows, [{1}, {1}], [1, 1], 2).search("greedy").measure
    terms = [Term(0, 1.0), Term(1, 1.0)]

    found = optimised(measure, terms, measure.score(terms))

    assert max(gaps) > gaps[ratios.index(1)]
    assert max(gaps) > gaps[ratios.index(1.5)]
    assert measure.score(found) == pytest.approx(max(gaps))
