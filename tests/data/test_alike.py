"""Records decoded together, against each of them decoded by itself."""

import re
from pathlib import Path

import numpy as np
import pytest
from example_bytes import byte_strings, floats, integers, record
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.alike import MOST_MISSES, AlikeDecoder
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.decode import Decoder
from ensemble_kit.data.schema import Modality, Schema
from ensemble_kit.data.tfrecord import BadRecord, write_records

NUM_CLASSES = 70_000  # labels of one, two and three bytes
WIDTHS = {"rgb": 3, "audio": 2}


def schema_of(level):
    value_type = "uint8" if level == "frame" else "float32"
    return Schema(
        level=level,
        modalities=[
            Modality(name=name, key=name, width=width, value_type=value_type)
            for name, width in WIDTHS.items()
        ],
        id_key="id",
        labels_key="labels",
        num_classes=NUM_CLASSES,
    )


@st.composite
def plain_records(draw):
    """Records as writers lay them out, of few ids' and labels' lengths, so that many are alike."""
    level = draw(st.sampled_from(["frame", "video"]))
    records = []
    for _ in range(draw(st.integers(1, 8))):
        labels = st.lists(st.integers(0, NUM_CLASSES - 1), min_size=1, max_size=3)
        context = {
            "id": byte_strings(draw(st.binary(min_size=2, max_size=3))),
            "labels": integers(draw(labels)),
            "start": floats([draw(st.floats(0, 9, width=32))]),
        }
        if draw(st.booleans()):
            context = dict(reversed(context.items()))
        if level == "video":
            value = st.floats(-2, 2, width=32)
            for name, width in WIDTHS.items():
                values = draw(st.lists(value, min_size=width, max_size=width))
                context[name] = floats(values)
            records.append(record(context))
        else:
            count = draw(st.integers(1, 3))
            frames = {
                name: [byte_strings(draw(st.binary(min_size=w, max_size=w))) for _ in range(count)]
                for name, w in WIDTHS.items()
            }
            records.append(record(context, frames))
    return level, records


def groups_of(records):
    by_length = {}
    for row, content in enumerate(records):
        by_length.setdefault(len(content), []).append(row)
    return [
        (np.array(rows), np.array([list(records[row]) for row in rows], np.uint8))
        for rows in by_length.values()
    ]


def assert_same(videos, records, schema):
    decoder = Decoder(schema)
    expected = [decoder.decode(each, path=Path("a"), number=1) for each in records]
    assert list(videos.ids) == [video.id for video in expected]
    assert sorted(row for part in videos.parts for row in part.rows) == list(range(len(records)))
    for classes, video in zip(videos.classes, expected, strict=True):
        np.testing.assert_array_equal(classes, video.classes, strict=True)
    for part in videos.parts:
        for values, name in zip(part.frames, WIDTHS, strict=True):
            for frames, row in zip(values, part.rows, strict=True):
                np.testing.assert_array_equal(frames, expected[row].frames[name])


@settings(max_examples=80, deadline=None)
@given(plain_records())
def test_records_as_writers_lay_them_out_are_decoded_together(drawn):
    level, records = drawn
    alike = AlikeDecoder(schema_of(level), needs_labels=True)

    for batch in (records, records[::-1]):  # the second time all patterns are known
        assert_same(alike.decode(groups_of(batch)), batch, schema_of(level))


@settings(max_examples=150, deadline=None)
@given(plain_records(), st.data())
def test_a_record_with_any_byte_changed_is_read_alike_or_left_alone(drawn, data):
    level, records = drawn
    which = data.draw(st.integers(0, len(records) - 1))
    changed = bytearray(records[which])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    alike = AlikeDecoder(schema_of(level), needs_labels=True)
    alike.decode(groups_of(records))

    batch = [*records[:which], bytes(changed), *records[which + 1 :]]
    videos = alike.decode(groups_of(batch))

    if videos is not None:
        assert_same(videos, batch, schema_of(level))


def test_labels_may_be_missing_where_they_are_not_needed():
    context = {"id": byte_strings(b"v"), "rgb": floats([1, 2, 3]), "audio": floats([4, 5])}
    groups = groups_of([record(context)] * 2)
    schema = schema_of("video")

    videos = AlikeDecoder(schema, needs_labels=False).decode(groups)

    assert [classes.tolist() for classes in videos.classes] == [[], []]
    assert AlikeDecoder(schema, needs_labels=True).decode(groups) is None


def made(labels, values=(1, 2, 3)):
    context = {"id": byte_strings(b"v"), "labels": integers(labels), "rgb": floats(values)}
    return record({**context, "audio": floats([4, 5])})


@pytest.mark.parametrize("label", [NUM_CLASSES, -1])
def test_labels_that_are_no_classes_are_left_to_the_decoder_that_names_them(label):
    schema = schema_of("video")
    with pytest.raises(BadRecord):
        Decoder(schema).decode(made([label]), path=Path("a"), number=1)

    alike = AlikeDecoder(schema, needs_labels=True)

    assert alike.decode(groups_of([made([300])] * 2)) is not None
    assert alike.decode(groups_of([made([300]), made([label])])) is None


@pytest.mark.parametrize("skips", [False, True])
def test_a_number_that_is_not_finite_is_named_by_its_record(tmp_path, skips):
    path = tmp_path / "a.tfrecord"
    write_records(path, [made([1]), made([2], (1, float("nan"), 3)), made([3])], force=False)
    records = Records([path], schema=schema_of("video"), skip_bad_records=skips)
    problem = f"{path}, record 2: frame 1 of rgb holds nan in video 'v'."

    batches = records.training_batches(3, seed=0, epochs=1)

    if skips:
        (batch,) = batches
        assert sorted(batch.labels.classes.tolist()) == [1, 3]
    else:
        with pytest.raises(BadRecord, match=re.escape(problem)):
            list(batches)


def test_after_some_batches_of_unusual_records_no_more_are_tried():
    context = {"id": byte_strings(b"v"), "labels": integers([1], packed=False)}
    unusual = record({**context, "rgb": floats([1, 2, 3]), "audio": floats([4, 5])})
    alike = AlikeDecoder(schema_of("video"), needs_labels=True)

    for _ in range(MOST_MISSES):
        assert alike.is_worth_it
        assert alike.decode(groups_of([unusual])) is None
    assert not alike.is_worth_it
