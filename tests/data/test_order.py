from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Barrier
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data import order
from ensemble_kit.data.balance import UNIT, by_shard
from ensemble_kit.data.order import (
    PLACE_BYTES,
    Place,
    RecordIndex,
    batch_plans,
    shuffled,
    training_order,
)
from ensemble_kit.data.tfrecord import Shard

SHARDS = st.lists(st.integers(0, 6), min_size=1, max_size=7)  # records in each


def index_of(counts, *, length=5):
    """An index of made-up files, which is told where their records lie when it asks."""
    looked_through = []

    def locate(path, **_):
        looked_through.append(path)
        count = counts[int(path.name)]
        return Shard(np.arange(count) * 1000, np.full(count, length), 1000 * count, 0, "")

    paths = [Path(str(shard)) for shard in range(len(counts))]
    index = RecordIndex(paths, check_crc=True, on_bad=pytest.fail)
    return index, locate, looked_through


def all_places(counts):
    return {(shard, n) for shard, count in enumerate(counts) for n in range(1, count + 1)}


@settings(deadline=None, max_examples=60)
@given(
    counts=SHARDS,
    num_ranks=st.integers(1, 4),
    videos_more=st.integers(0, 5),
    seed=st.integers(0, 9),
    max_bytes=st.sampled_from([0, 3 * (PLACE_BYTES + 5), 1 << 20]),
)
def test_every_record_comes_once_an_epoch_for_any_shards_batches_and_ranks(
    counts, num_ranks, videos_more, seed, max_bytes
):
    batch_size = num_ranks + videos_more
    index, locate, _ = index_of(counts)
    plans = partial(batch_plans, index, batch_size, seed=seed, epochs=3, shuffle_bytes=max_bytes)
    with patch.object(order, "locate_records", locate):
        whole = list(plans())
        shares = [list(plans(rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]

    assert all(len(plan.turns) == batch_size for plan in whole[:-1])
    turns = [turn for plan in whole for turn in plan.turns]
    for epoch in range(3):
        own = [turn for turn in turns if turn.epoch == epoch]
        assert [turn.position for turn in own] == list(range(sum(counts)))
        found = [(turn.place.shard, turn.place.number) for turn in own]
        assert len(found) == sum(counts)
        assert set(found) == all_places(counts)
        assert [turn.place.start for turn in own] == [1000 * (n - 1) for _, n in found]
    assert [turn.epoch for turn in turns] == sorted(turn.epoch for turn in turns)
    for plan, *parts in zip(whole, *shares, strict=True):
        split = np.array_split(np.arange(len(plan.turns)), num_ranks)
        assert [list(part.turns) for part in parts] == [
            [plan.turns[i] for i in own] for own in split
        ]
        assert {part.epoch for part in parts} == {plan.epoch} == {plan.turns[-1].epoch}


@settings(deadline=None, max_examples=30)
@given(SHARDS.filter(any), st.integers(1, 8), st.integers(0, 12))
def test_batches_from_any_start_on_are_those_of_the_whole_order(counts, batch_size, start):
    index, locate, _ = index_of(counts)
    with patch.object(order, "locate_records", locate):
        whole = list(islice(batch_plans(index, batch_size, seed=1), start + 3))
        rest = list(islice(batch_plans(index, batch_size, seed=1, start=start), 3))

    assert rest == whole[start:]


@settings(deadline=None, max_examples=30)
@given(SHARDS.filter(any), st.integers(1, 8), st.integers(0, 12), st.data())
def test_balanced_epochs_keep_their_length_and_any_start_their_order(
    counts, batch_size, start, data
):
    num_records = sum(counts)
    cuts = data.draw(
        st.lists(st.integers(0, num_records), min_size=num_records - 1, max_size=num_records - 1)
    )
    turns = np.diff([0, *sorted(cuts), num_records])  # of each record in an epoch, whole ones
    shares = by_shard(turns * UNIT, counts)
    index, locate, _ = index_of(counts)
    with patch.object(order, "locate_records", locate):
        whole = list(islice(batch_plans(index, batch_size, seed=1, shares=shares), start + 3))
        rest = list(islice(batch_plans(index, batch_size, seed=1, start=start, shares=shares), 3))
        epoch = list(training_order(index, seed=1, epochs=1, shares=shares))

    assert rest == whole[start:]
    assert [turn.position for turn in epoch] == list(range(num_records))
    found = Counter((turn.place.shard, turn.place.number) for turn in epoch)
    expected = {
        (shard, number): own // UNIT
        for shard, each in enumerate(shares)
        for number, own in enumerate(each, 1)
    }
    assert found == Counter(expected)


def test_seeds_and_epochs_have_orders_of_their_own():
    index, locate, _ = index_of([4, 1, 6])
    with patch.object(order, "locate_records", locate):
        orders = {
            tuple(turn.place for turn in training_order(index, seed=seed, epochs=2))[
                epoch : epoch + 11
            ]
            for seed in range(3)
            for epoch in (0, 11)
        }

    assert len(orders) == 6


def test_files_are_looked_through_once_and_not_long_before_the_order_needs_them():
    index, locate, looked_through = index_of([2] * 30, length=order.SHUFFLE_BYTES // 3)
    with patch.object(order, "locate_records", locate):
        turns = training_order(index, seed=0)
        next(turns)
        num_first = len(looked_through)
        list(islice(turns, 90))

    assert num_first <= 2 + order.FILES_AHEAD  # four records are more than the buffer holds
    assert len(looked_through) == len(set(looked_through)) == 30
    assert index.is_complete


def test_files_ahead_are_looked_through_while_others_wait_for_their_disk():
    index, locate, _ = index_of([2] * 24)
    together = Barrier(order.FILES_AHEAD, timeout=20)

    def slowly(path, **options):
        together.wait()
        return locate(path, **options)

    with patch.object(order, "locate_records", slowly):
        assert index.count() == 48


@pytest.mark.parametrize("max_bytes", [0, 3 * (PLACE_BYTES + 5), 1 << 20])
def test_shuffling_within_few_bytes_keeps_every_place_once_and_the_bytes_bounded(max_bytes):
    places = [Place(0, number, 0, 5) for number in range(20)]
    given = []

    def source():
        for place in places:
            given.append(place)
            yield place

    out, ahead = [], []
    for place in shuffled(source(), np.random.default_rng(0), max_bytes=max_bytes):
        ahead.append(len(given) - len(out))
        out.append(place)

    assert sorted(out) == places
    most = max_bytes // (PLACE_BYTES + 5) + 1  # one more is taken before one is drawn
    assert max(ahead) == min(20, most)
    assert (out == places) == (max_bytes == 0)
