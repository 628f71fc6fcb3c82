import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.labels import LabelLists

LISTS = st.lists(st.lists(st.integers(0, 6), max_size=5), max_size=6)


@settings(deadline=None, max_examples=50)
@given(LISTS)
def test_dense_labels_are_true_where_the_lists_say(lists):
    labels = LabelLists.from_lists(lists)

    dense = labels.dense(7)

    assert labels.num_videos == len(lists)
    assert dense.dtype == bool
    assert dense.shape == (len(lists), 7)
    for row, classes in zip(dense, lists, strict=True):
        for index in range(7):
            assert row[index] == (index in classes)


@settings(deadline=None, max_examples=50)
@given(LISTS, st.data())
def test_rows_are_the_labels_of_those_videos(lists, data):
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))

    rows = LabelLists.from_lists(lists).rows(start, stop)

    expected = LabelLists.from_lists(lists[start:stop])
    np.testing.assert_array_equal(rows.offsets, expected.offsets)
    np.testing.assert_array_equal(rows.classes, expected.classes)


def test_classes_are_sorted_and_each_is_kept_once():
    labels = LabelLists.from_lists([[5, 2, 5], np.array([], np.int64), np.array([3])])

    assert labels.offsets.tolist() == [0, 2, 2, 3]
    assert labels.classes.tolist() == [2, 5, 3]
    assert labels.offsets.dtype == labels.classes.dtype == np.int64
