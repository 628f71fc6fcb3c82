from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.balance import UNIT, by_shard, repeated, turns_of
from ensemble_kit.data.labels import LabelLists

LISTS = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(lists=LISTS, balance=st.floats(0, 1))
def test_a_record_comes_as_often_as_its_rarest_class_asks(lists, balance):
    turns = turns_of(LabelLists.from_lists(lists), 5, balance)

    count = len(lists)
    shares = []
    for own in lists:
        rarities = [count / sum(c in other for other in lists) for c in set(own)]
        shares.append(max(rarities, default=1.0) ** balance)
    expected = [count * share / sum(shares) for share in shares]
    assert turns.sum() == count * UNIT
    assert turns / UNIT == pytest.approx(expected, abs=1e-8)


@settings(deadline=None, max_examples=100)
@given(lists=LISTS, balance=st.floats(0, 1), start=st.integers(0, UNIT - 1))
def test_an_epoch_keeps_its_length_and_each_record_its_whole_turns(lists, balance, start):
    turns = turns_of(LabelLists.from_lists(lists), 5, balance).tolist()

    counts = Counter(repeated(enumerate(turns), start))

    assert counts.total() == len(lists)
    for number, own in enumerate(turns):
        assert own // UNIT <= counts[number] <= -(-own // UNIT)


def test_over_many_starts_each_record_has_its_share():
    turns = [UNIT // 2, 2 * UNIT + UNIT // 4, UNIT // 4]
    starts = range(0, UNIT, UNIT // 64)

    counts = Counter(item for start in starts for item in repeated(enumerate(turns), start))

    assert [counts[item] / len(starts) for item in range(3)] == [0.5, 2.25, 0.25]


def test_turns_are_cut_into_files():
    assert by_shard(np.arange(5), [2, 0, 3]) == [[0, 1], [], [2, 3, 4]]
