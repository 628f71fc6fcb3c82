"""Submissions of segments: kept, written, read, refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kit.errors import PredictionsError
from ensemble_kit.predictions.segment_csv import (
    TopSegments,
    is_submission,
    read_classes,
    read_submission,
    write_submission,
)

WRITE = "Write it with `ensemble-kit predict MODEL DATA --segments -o FILE`."


@given(
    st.lists(st.lists(st.sampled_from([0, 0.25, 0.5, 1]), min_size=3, max_size=3), min_size=1),
    st.integers(1, 5),
)
def test_the_best_segments_of_each_class_are_kept_the_first_of_equal_ones(rows, k):
    segments = TopSegments(3, k=k)
    for place, row in enumerate(rows):
        segments.add(f"v{place // 2}", 5 * (place % 2), np.array(row, np.float32))

    for index in range(3):
        order = sorted(range(len(rows)), key=lambda place: -rows[place][index])[:k]
        names = [f"v{place // 2}:{5 * (place % 2)}" for place in order]
        assert segments.best(index) == names


def test_what_is_written_is_read_again(tmp_path):
    segments = TopSegments(4)
    for start, row in ((0, [0.1, 0.5, 0.2, 0]), (5, [0.3, 0.4, 0.2, 1])):
        segments.add("ab", start, np.array(row, np.float32))
    path = tmp_path / "s.csv"

    write_submission(path, segments, [3, 0, 1], force=False)

    assert path.read_text() == ("Class,Segments\n3,ab:5 ab:0\n0,ab:5 ab:0\n1,ab:0 ab:5\n")
    assert list(read_submission(path)) == [
        (3, ["ab:5", "ab:0"]), (0, ["ab:5", "ab:0"]), (1, ["ab:0", "ab:5"])
    ]  # fmt: skip
    assert is_submission(path)
    assert not is_submission(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Class,Segments\n", " holds no classes.\nWrite one line for each class under the header."),
        ("Class,Segments\n1,a:0\n1,b:0\n", ", line 3: class '1' is on line 2 already.\n"
         "Keep one line for each class."),
        ("Class,Segments\n-1,a:0\n", f", line 2: '-1' is no class.\n{WRITE}"),
        ("Class,Segments\n1,a:0 b:0 a:0\n", ", line 2: segment 'a:0' stands there twice.\n"
         f"{WRITE}"),
    ],
)  # fmt: skip
def test_what_is_no_submission_is_refused(text, message, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(text)

    with pytest.raises(PredictionsError) as caught:
        list(read_submission(path))

    assert str(caught.value) == f"{path}{message}"


@pytest.mark.parametrize("video", ["a b", "a,b", 'a"b', "a\nb", ""])
def test_an_id_that_a_line_cannot_keep_is_refused(video):
    with pytest.raises(PredictionsError) as caught:
        TopSegments(1).add(video, 0, np.zeros(1, np.float32))

    assert str(caught.value) == (
        f"Video id {video!r} cannot stand in a submission of segments.\n"
        "Give every record an id without spaces, commas and quotation marks."
    )


def test_classes_are_read_under_a_heading_or_without(tmp_path):
    path = tmp_path / "c.csv"
    for text in ("Index\n3\n0\n", "3\n0"):
        path.write_text(text)
        assert read_classes(path, 4) == [3, 0]

    for text, problem in (("3\n4", "'4' is none of the 4 classes"), ("3\n3", "'3' comes twice")):
        path.write_text(text)
        with pytest.raises(PredictionsError) as caught:
            read_classes(path, 4)
        assert str(caught.value) == f"{path}: {problem}.\nList each class of a submission once."
