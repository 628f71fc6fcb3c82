"""Folds of records by a hash of their ids."""

import hashlib
from itertools import chain

import numpy as np
import pytest
from example_bytes import frame_record

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.folds import Fold
from ensemble_kit.data.tfrecord import write_records
from ensemble_kit.errors import RecordError

ONE_FRAME = {"rgb": np.ones((1, 3), np.uint8), "audio": np.ones((1, 2), np.uint8)}
FOLD = Fold(2, 3)


def write_shards(folder, ids):
    """Write records to three files, whichever are wanted; return the records."""
    folder.mkdir()
    for shard in range(3):
        own = [frame_record(each, [0, len(each) % 2], **ONE_FRAME) for each in ids[shard::3]]
        write_records(folder / f"{shard}.tfrecord", own, force=False)
    return folder


def ids_of(batches):
    return [video for batch in batches for video in batch.ids]


def test_a_video_is_in_the_fold_that_its_hash_leaves():
    for number in range(200):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        rest = int(digest[:16], 16) % 5
        assert [Fold(each, 5).holds(str(number)) for each in range(1, 6)] == [
            rest == each for each in range(5)
        ]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/1", "1", "1/3/5", "one/3", "-1/3", "01/3", ""])
def test_what_is_no_fold_is_refused(text):
    with pytest.raises(RecordError) as caught:
        Fold.parse(text)

    assert str(caught.value) == (
        f"{text!r} is no fold: its number, /, and how many folds there are, at least 2.\n"
        "Write --fold 1/5 for the first of five folds, up to --fold 5/5."
    )
    assert Fold.parse("3/3") == Fold(3, 3)


def test_records_in_a_fold_and_outside_are_all_records_in_their_order(schema, tmp_path):
    ids = [f"v{number}" for number in range(20)]
    records = Records([write_shards(tmp_path / "all", ids)], schema=schema)

    others, own = records.folds(FOLD)

    everything = [video.id for video in records.videos()]
    assert [video.id for video in own.videos()] == [each for each in everything if FOLD.holds(each)]
    assert ids_of(others.batches(3)) == [each for each in everything if not FOLD.holds(each)]
    assert (others.count() + own.count(), own.count()) == (20, sum(map(FOLD.holds, ids)))
    shared = [ids_of(own.batches(2, rank=rank, num_ranks=2)) for rank in range(2)]
    batches = [batch.ids for batch in own.batches(2)]
    assert shared == [list(chain(*batches[rank::2])) for rank in range(2)]
    assert records.part is None
    assert (str(others.part), str(own.part)) == ("all but fold 2/3", "fold 2/3")


@pytest.mark.parametrize("balance", [None, 0.5])
def test_training_outside_of_a_fold_is_training_on_files_without_it(balance, schema, tmp_path):
    ids = [f"{'v' * (1 + number % 2)}{number}" for number in range(24)]
    whole = Records([write_shards(tmp_path / "all", ids)], schema=schema)
    others, _ = whole.folds(FOLD)
    folder = tmp_path / "others"
    folder.mkdir()
    for path in whole.paths:
        videos = [video.id for video in Records([path], schema=schema).videos()]
        kept = [each for each in videos if not FOLD.holds(each)]
        write_records(
            folder / path.name,
            [frame_record(each, [0, len(each) % 2], **ONE_FRAME) for each in kept],
            force=False,
        )
    alone = Records([folder], schema=schema)

    for options in ({"epochs": 3}, {"epochs": 3, "start": 4}):
        found = ids_of(others.training_batches(4, seed=1, balance=balance, **options))
        expected = ids_of(alone.training_batches(4, seed=1, balance=balance, **options))
        assert found == expected
    assert set(found) <= set(ids_of(others.batches(4)))


def test_a_part_without_records_is_refused(schema, tmp_path):
    outside = next(each for each in map(str, range(9)) if not FOLD.holds(each))
    write_records(tmp_path / "a.tfrecord", [frame_record(outside, [0], **ONE_FRAME)], force=False)
    others, own = Records([tmp_path], schema=schema).folds(FOLD)

    for read in (own.batches, lambda size: own.training_batches(size, seed=0)):
        with pytest.raises(RecordError) as caught:
            next(read(4))
        assert str(caught.value) == (
            f"{tmp_path / 'a.tfrecord'}: no record of the 1 file is in fold 2/3.\n"
            "Take fewer folds, or more records."
        )
    assert ids_of(others.training_batches(4, seed=0, epochs=1)) == [outside]


def test_a_part_looks_for_its_records_once(folder, monkeypatch):
    others, _ = Records([folder]).folds(Fold(1, 2))
    looked = []
    placed = Records.placed_videos
    monkeypatch.setattr(Records, "placed_videos", lambda self: looked.append(self) or placed(self))

    for _ in range(2):
        list(others.training_batches(4, seed=0, epochs=1))

    assert len(looked) == 1
