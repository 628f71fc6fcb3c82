"""Ratings of segments, read from the context of frame-level records."""

import numpy as np
import pytest
from example_bytes import byte_strings, integers, rated_record, record

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.segments import HINT, read_ratings
from ensemble_kit.data.tfrecord import BadRecord, write_records
from ensemble_kit.errors import RecordError

FRAMES = {"rgb": [byte_strings(bytes(3))], "audio": [byte_strings(bytes(2))]}


def plain_record(video):
    return record({"id": byte_strings(video.encode()), "labels": integers([1])}, FRAMES)


def records_of(folder, schema, *records, **options):
    write_records(folder / "a.tfrecord", records, force=False)
    return Records([folder], schema=schema, **options)


def test_the_three_lists_of_a_record_go_together(schema, tmp_path):
    records = records_of(
        tmp_path,
        schema,
        rated_record("v", [0, 55, 0], [3, 900, 4], [1, 0, 0.5]),
        plain_record("w"),
        rated_record("x", [], [], []),
    )

    first, second = read_ratings(records)

    assert list(first.named()) == [("v:0", 3, True), ("v:55", 900, False), ("v:0", 4, True)]
    assert first.starts.dtype == first.classes.dtype == np.int64
    assert list(second.named()) == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (rated_record("v", [0], [3, 4], [1, 1]), "its segments have 1 starts, 2 labels and 2 "
         "scores."),
        (rated_record("v", [-5], [3], [1]), "its segments have a negative start or class."),
        (rated_record("v", [0], [3], [1], segment_scores=integers([1])), "its segments have 1 "
         "starts, 1 labels and 0 scores."),
        (record({"id": byte_strings(b"v"), "segment_labels": integers([1])}, FRAMES),
         "it has 'segment_labels' and no 'segment_scores'."),
        (b"\x0a\xff", "it is neither an Example nor a SequenceExample."),
    ],
)  # fmt: skip
def test_segments_that_do_not_fit_together_are_a_bad_record(bad, problem, schema, tmp_path):
    good = rated_record("w", [5], [1], [1])
    records = records_of(tmp_path, schema, good, bad, skip_bad_records=True)

    with pytest.raises(BadRecord) as caught:
        list(read_ratings(Records([tmp_path], schema=schema)))
    assert str(caught.value) == f"{tmp_path / 'a.tfrecord'}, record 2: {problem}\n{HINT}"
    assert [ratings.video for ratings in read_ratings(records)] == ["w"]
    assert records.num_skipped == 1


def test_records_without_ratings_are_refused(schema, tmp_path):
    with pytest.raises(RecordError) as caught:
        list(read_ratings(records_of(tmp_path, schema, plain_record("w"))))

    assert str(caught.value) == (
        f"{tmp_path / 'a.tfrecord'}: no record has 'segment_labels'.\n{HINT}"
    )
