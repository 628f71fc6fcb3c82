"""The same videos in several files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError
from ensemble_kit.predictions.videos import aligned, held_out, taken


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=6), st.data())
def test_labels_are_taken_in_the_order_asked_for(lists, data):
    order = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))

    labels = taken(LabelLists.from_lists(map(sorted, lists)), np.array(order, np.int64))

    expected = LabelLists.from_lists([sorted(lists[index]) for index in order])
    assert labels.offsets.tolist() == expected.offsets.tolist()
    assert labels.classes.tolist() == expected.classes.tolist()


def test_videos_are_found_whatever_their_order(tmp_path):
    order = aligned(("a", "b", "c"), tmp_path / "p", to=("c", "a", "b"), of=tmp_path / "q")

    assert order.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("ids", "to", "message"),
    [
        ("ab", "abc", "p.csv lacks video 'c', which q.csv has."),
        ("abc", "ab", "q.csv lacks video 'c', which p.csv has."),
        ("abd", "abc", "p.csv lacks video 'c', which q.csv has."),
    ],
)
def test_a_video_in_one_file_only_is_named(tmp_path, ids, to, message):
    with pytest.raises(PredictionsError) as caught:
        aligned(tuple(ids), "p.csv", to=tuple(to), of="q.csv")

    assert str(caught.value) == (
        f"{message}\nMake both files from the same videos; their order may differ."
    )


def test_a_video_is_held_out_whatever_the_others_are():
    ids = [f"video{index}" for index in range(50)]

    once = dict(zip(ids, held_out(ids, 0.25), strict=True))

    assert dict(zip(ids[::-3], held_out(ids[::-3], 0.25), strict=True)).items() <= once.items()
    assert 5 < sum(once.values()) < 20
    assert all(held_out(ids, 0.5)[np.array(list(once.values()))])
