"""MAP of segments, by hand and against loops over the published evaluation's steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kit.data.segments import Ratings
from ensemble_kit.segment_metrics import measure_segments


def ratings_of(entries):
    """Return the ratings of ``(segment, class) -> is_shown``, one object for each video."""
    videos = {}
    for (segment, index), is_shown in entries.items():
        video, start = segment.split(":")
        videos.setdefault(video, []).append((int(start), index, is_shown))
    return [
        Ratings(video, *(np.array(column) for column in zip(*rows, strict=True)))
        for video, rows in videos.items()
    ]


def test_a_case_by_hand():
    entries = {
        ("a:0", 1): True, ("a:5", 1): False, ("b:0", 1): True, ("b:5", 1): True,
        ("a:0", 2): True, ("b:0", 3): False, ("b:5", 4): True,
    }  # fmt: skip
    submission = [
        (1, ["c:0", "a:0", "a:5", "b:10", "b:5"]),  # of the three rated ones: shown, not, shown
        (2, ["b:0"]),  # a:0 is not listed
        (3, ["b:0"]),  # no segment is known to show it, so it does not count
        (7, ["a:0"]),  # nobody was asked about it
    ]  # and class 4 is not listed

    found = measure_segments(submission, ratings_of(entries))

    assert found.map_at_k == pytest.approx(((1 / 1 + 2 / 3) / 3 + 0 + 0) / 3)
    assert (found.k, found.classes_with_positives) == (100_000, 3)
    assert (found.positives, found.rated) == (5, 7)


def test_what_comes_after_the_first_k_does_not_count():
    entries = {("a:0", 1): True, ("b:0", 1): True}
    submission = [(1, ["x:0", "a:0", "b:0"])]

    assert measure_segments(submission, ratings_of(entries), k=2).map_at_k == 1 / 2
    assert measure_segments(submission, ratings_of(entries), k=3).map_at_k == 1


def published_map(submission, entries, k):
    """Follow the published script, step by step, over the classes of the submission."""
    precisions = []
    for index in sorted(submission):
        listed = submission[index][:k]
        labels = [entries[segment, index] for segment in listed if (segment, index) in entries]
        num_positives = sum(shown for (_, own), shown in entries.items() if own == index)
        found, total = 0, 0.0
        for place, label in enumerate(labels):  # their scores fall in this order
            if label:
                found += 1
                total += found / (place + 1)
        precisions.append(total / num_positives)
    return sum(precisions) / len(precisions)


SEGMENTS = [f"{video}:{start}" for video in "abc" for start in (0, 5)]


@given(st.data())
def test_a_submission_of_the_known_classes_scores_what_the_published_script_says(data):
    entries = data.draw(
        st.dictionaries(
            st.tuples(st.sampled_from(SEGMENTS), st.integers(0, 3)), st.booleans(), min_size=1
        )
    )
    known = {index for (_, index), is_shown in entries.items() if is_shown}
    submission = {
        index: data.draw(st.permutations(SEGMENTS))[: data.draw(st.integers(0, 6))]
        for index in known
    }
    k = data.draw(st.integers(1, 6))

    found = measure_segments(submission.items(), ratings_of(entries), k=k)

    expected = published_map(submission, entries, k) if known else 0
    assert found.map_at_k == pytest.approx(expected, abs=1e-12)
    assert found.classes_with_positives == len(known)
