"""MAP of mixtures on rated segments, against the metric of submissions made of them."""

import numpy as np
import pytest
from candidate_builders import candidates_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.segments import Ratings
from ensemble_kit.errors import SelectionError
from ensemble_kit.segment_metrics import measure_segments
from ensemble_kit.selection import segment_scoring
from ensemble_kit.selection.scoring import Term
from ensemble_kit.selection.segment_scoring import SegmentJudge, read_segments


def named(known):
    """Return the candidates with names of segments in place of videos."""
    from dataclasses import replace

    return replace(
        known, ids=tuple(f"v{place // 2}:{place % 2}" for place in range(len(known.ids)))
    )


@st.composite
def cases(draw):
    """Few distinct scores, so that ties are everywhere, and ratings of some pairs."""
    num_segments, num_classes = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    score = st.sampled_from([0.0, 0.125, 0.25, 0.75])
    row = st.lists(score, min_size=num_classes, max_size=num_classes)
    one = st.lists(row, min_size=num_segments, max_size=num_segments)
    rows = draw(st.lists(one, min_size=1, max_size=3))
    pair = st.tuples(st.integers(0, num_segments - 1), st.integers(0, num_classes - 1))
    rated = draw(st.dictionaries(pair, st.booleans(), min_size=1))
    order = draw(st.permutations(range(len(rows))))
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=3, max_size=3))
    return rows, rated, [Term(*pair) for pair in zip(order, weights, strict=False)]


def known_of(rows, rated):
    positives = [{index for (s, index), shown in rated.items() if s == place and shown}
                 for place in range(len(rows[0]))]  # fmt: skip
    return named(candidates_of(rows, positives))


def ratings_of(rated):
    return [
        Ratings(f"v{place // 2}", np.array([place % 2]), np.array([index]), np.array([shown]))
        for (place, index), shown in rated.items()
    ]


def submitted(rows, rated, terms, places):
    """Return the metric of the submission that ranks these segments by a mixture."""
    scores = sum(np.array(rows[term.candidate]) * term.weight for term in terms)
    submission = []
    for index in range(scores.shape[1]):
        order = sorted(places, key=lambda place: -scores[place][index])
        submission.append((index, [f"v{place // 2}:{place % 2}" for place in order]))
    own = {pair: shown for pair, shown in rated.items() if pair[0] in places}
    return measure_segments(submission, ratings_of(own)).map_at_k


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_a_mixture_scores_what_its_submission_does(case, data):
    rows, rated, terms = case
    num_segments = len(rows[0])
    is_in = np.array([True, False, *(data.draw(st.booleans()) for _ in range(num_segments - 2))])
    judge = SegmentJudge.of(
        read_segments(known_of(rows, rated), ratings_of(rated)), [is_in, ~is_in]
    )

    scores = judge.scores(terms)

    everywhere = list(range(num_segments))
    assert scores == pytest.approx(
        (
            submitted(rows, rated, terms, np.flatnonzero(is_in).tolist()),
            submitted(rows, rated, terms, np.flatnonzero(~is_in).tolist()),
            submitted(rows, rated, terms, everywhere),
        ),
        abs=1e-12,
    )
    found = judge.everything.scores_with(terms[:1], terms)
    assert found == [judge.everything.score([terms[0], term]) for term in terms]
    assert judge.scores([]) == (0, 0, 0)
    assert judge.everything.num_positives == sum(rated.values())


def test_a_resample_in_which_each_segment_is_drawn_once_is_the_metric(monkeypatch):
    rows = [[[0.5, 0.1], [0.25, 0.2], [0.75, 0.1]]]
    rated = {(0, 0): True, (1, 0): False, (2, 0): False, (1, 1): True, (2, 1): False}
    scorer = read_segments(known_of(rows, rated), ratings_of(rated))
    monkeypatch.setattr(
        "ensemble_kit.selection.class_ranking.drawn_counts",
        lambda num_videos, *, resamples, seed: np.array([[1, 2], [1, 0], [1, 1]], np.uint8),
    )

    found = scorer.resampled([[Term(0, 1.0)]], resamples=2, seed=0)

    # The first has every segment once. In the second, class 1 is shown nowhere, and of class 0 the
    # segment that is shown stands twice, after one that is not: precision 2 of 3.
    score = scorer.score([Term(0, 1.0)])
    shift = score - (score + 2 / 3) / 2
    assert found.tolist() == [pytest.approx([score + shift, 2 / 3 + shift])]


def test_ratings_that_the_candidates_do_not_cover_are_refused(monkeypatch):
    known = known_of([[[0.5, 0.1], [0.25, 0.2]]], {(0, 0): True})

    for rating, problem in (
        (Ratings("v9", np.array([0]), np.array([0]), np.array([True])),
         "Segment v9:0 has ratings, but candidate0 does not hold it."),
        (Ratings("v0", np.array([0]), np.array([7]), np.array([True])),
         "Class 7 has ratings, and candidate0 has no such class."),
    ):  # fmt: skip
        with pytest.raises(SelectionError) as caught:
            read_segments(known, [rating])
        assert str(caught.value).startswith(problem)
    monkeypatch.setattr(segment_scoring, "SEGMENTS_PER_CLASS", 1)
    with pytest.raises(SelectionError, match="There are 2 segments, and the metric counts"):
        read_segments(known, [])
