from pathlib import Path

import numpy as np
import pytest
from example_bytes import byte_strings, floats, frame_record, integers, message, record
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.decode import Decoder, Layout
from ensemble_kit.data.schema import Modality, Schema
from ensemble_kit.data.tfrecord import BadRecord

PATH = Path("a.tfrecord")
CORRECT_SCHEMA = "Give a schema that says so, or leave the record out with --skip-bad-records."
MAKE_AGAIN = "Make the record again, or leave it out with --skip-bad-records."
UINT8, FLOAT32 = "uint8", "float32"
FRAMES = {"rgb": [byte_strings(b"ab"), byte_strings(b"cd")], "audio": [byte_strings(b"e")] * 2}
CONTEXT = {"id": byte_strings(b"v"), "labels": integers([1])}
NAN, INFINITY = float("nan"), float("inf")


def make_schema(level="frame", **modalities):
    """A schema of modalities, each a width and a value type; 6 classes."""
    return Schema(
        level=level,
        modalities=[
            Modality(name=name, key=name, width=width, value_type=value_type)
            for name, (width, value_type) in modalities.items()
        ],
        id_key="id",
        labels_key="labels",
        num_classes=6,
    )


def decode(record, schema):
    return Decoder(schema).decode(record, path=PATH, number=3)


def assert_is(video, name, labels, frames):
    assert video.id == name
    assert video.classes.dtype == np.int64
    assert video.classes.tolist() == sorted(set(labels))
    assert list(video.frames) == list(frames)
    for key, values in frames.items():
        np.testing.assert_array_equal(video.frames[key], values, strict=True)


def arrays(value_type, num_frames, width):
    if value_type == UINT8:
        values = st.integers(0, 255)
    else:
        values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    row = st.lists(values, min_size=width, max_size=width)
    return st.lists(row, min_size=num_frames, max_size=num_frames).map(
        lambda rows: np.array(rows, value_type).reshape(num_frames, width)
    )


def shuffled(draw, mapping):
    return dict(draw(st.permutations(list(mapping.items()))))


@st.composite
def written_videos(draw):
    """A schema, what a record of it holds, and its bytes in some way the format allows."""
    level = draw(st.sampled_from(["frame", "video"]))
    num_frames = draw(st.integers(1, 4)) if level == "frame" else 1
    streams = {
        name: (draw(st.integers(1, 5)), draw(st.sampled_from([UINT8, FLOAT32])))
        for name in draw(st.sampled_from([("a",), ("a", "b"), ("b", "a")]))
    }
    frames = {k: draw(arrays(kind, num_frames, width)) for k, (width, kind) in streams.items()}
    labels = draw(st.lists(st.integers(0, 5), max_size=4))
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=4))

    flag = st.booleans()
    features = {
        key: [
            byte_strings(bytes(row), overlong=draw(flag) and draw(flag))
            if rows.dtype == np.uint8
            else floats(row.tolist(), packed=draw(flag) or draw(flag))
            for row in rows
        ]
        for key, rows in frames.items()
    }
    context = {
        "id": byte_strings(name.encode()),
        "labels": integers(labels, packed=draw(flag)),
        "unknown": draw(st.sampled_from([floats([1.5]), integers([-7]), byte_strings(b"x", b"")])),
    }
    lists = None
    if level == "frame":
        lists = shuffled(draw, features | {"unknown": [integers([1]), floats([])]})
    else:
        context |= {key: feature for key, (feature,) in features.items()}
    encoded = record(shuffled(draw, context), lists, lists_first=draw(flag), value_first=draw(flag))
    return make_schema(level, **streams), (name, labels, frames), encoded


@settings(deadline=None, max_examples=150)
@given(written_videos())
def test_every_way_to_write_a_video_reads_the_same_by_views_and_by_values(written):
    schema, video, encoded = written

    assert_is(decode(encoded, schema), *video)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "strided", lambda self, payload: None)
        assert_is(decode(encoded, schema), *video)


@pytest.mark.parametrize("width", [1, 127, 128, 1024])
def test_frames_that_are_all_alike_are_a_view(width):
    frames = np.random.default_rng(0).integers(0, 256, (3, width), np.uint8)

    video = decode(frame_record(rgb=frames), make_schema(rgb=(width, UINT8)))

    np.testing.assert_array_equal(video.frames["rgb"], frames, strict=True)
    assert video.frames["rgb"].base is not None
    assert not video.frames["rgb"].flags.c_contiguous


def test_a_value_in_two_parts_is_read_whole():
    schema = make_schema(rgb=(2, UINT8))
    rows = [byte_strings(bytes(row)) for row in ([1, 2], [3, 4], [5, 6])]
    parts = message(2, message(1, rows[0])) + message(2, message(1, rows[1]) + message(1, rows[2]))
    lists = message(2, message(1, message(1, b"rgb") + parts))
    context = record({"id": byte_strings(b"v"), "labels": integers([2])})

    video = decode(context + lists, schema)

    assert video.frames["rgb"].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_frames_beyond_the_most_are_left_out_but_counted():
    frames = np.arange(14, dtype=np.uint8).reshape(7, 2)
    schema = make_schema(rgb=(2, UINT8), audio=(2, UINT8)).model_copy(update={"max_frames": 5})
    uneven = [byte_strings(bytes(row), overlong=True) for row in frames]

    video = decode(frame_record(rgb=frames, audio=frames), schema)
    parsed = decode(record(CONTEXT, {"rgb": uneven, "audio": uneven}), schema)
    with pytest.raises(BadRecord, match="7 of rgb and 6 of audio"):
        decode(frame_record(rgb=frames, audio=frames[:6]), schema)

    for each in (video, parsed):
        assert each.num_frames == 5
        np.testing.assert_array_equal(each.frames["rgb"], frames[:5])


def test_an_id_that_is_not_text_is_escaped_and_labels_may_be_nothing_at_all():
    encoded = record(
        {"id": byte_strings(b"a\xff"), "labels": b""}, {"rgb": [byte_strings(bytes([1, 2]))]}
    )

    video = decode(encoded, make_schema(rgb=(2, UINT8)))

    assert video.id == r"a\xff"
    assert video.classes.tolist() == []


@pytest.mark.parametrize(
    ("context", "lists", "problem", "kind", "hint"),
    [
        (
            {"labels": integers([3, 6])},
            {},
            "label 6 is outside the 6 classes (0 to 5).",
            "a label outside the classes",
            CORRECT_SCHEMA,
        ),
        (
            {"labels": integers([3, -1], packed=False)},
            {},
            "label -1 is outside the 6 classes (0 to 5).",
            "a label outside the classes",
            CORRECT_SCHEMA,
        ),
        (
            {},
            {"rgb": [byte_strings(b"ab"), byte_strings(b"cde")]},
            "frame 2 of rgb has 3 features, the schema says 2.",
            "a frame of another width",
            CORRECT_SCHEMA,
        ),
        (
            {},
            {"audio": [byte_strings(b"e")] * 3},
            "its modalities differ in frames: 2 of rgb and 3 of audio.",
            "modalities of different lengths",
            MAKE_AGAIN,
        ),
        ({}, {"rgb": [], "audio": []}, "it has no frames.", "no frames", MAKE_AGAIN),
        (
            {"id": None},
            {},
            "it has no 'id' where the schema says "
            "(found context labels; feature lists audio, rgb).",
            "a missing key",
            CORRECT_SCHEMA,
        ),
        (
            {"labels": None},
            {},
            "it has no 'labels' where the schema says "
            "(found context id; feature lists audio, rgb).",
            "a missing key",
            CORRECT_SCHEMA,
        ),
        (
            {"rgb": byte_strings(b"ab")},
            {"rgb": None},
            "it has no 'rgb' where the schema says "
            "(found context id, labels, rgb; feature lists audio).",
            "a missing key",
            CORRECT_SCHEMA,
        ),
        (
            {"id": integers([7])},
            {},
            "'id' holds integers, expected bytes.",
            "a value of another kind",
            CORRECT_SCHEMA,
        ),
        (
            {"id": byte_strings(b"a", b"b")},
            {},
            "'id' holds 2 byte strings, expected 1.",
            "a value of another kind",
            CORRECT_SCHEMA,
        ),
        (
            {"labels": byte_strings(b"1")},
            {},
            "'labels' holds bytes, expected integers.",
            "a value of another kind",
            CORRECT_SCHEMA,
        ),
        (
            {},
            {"rgb": [byte_strings(b"ab"), b""]},
            "frame 2 of rgb holds nothing, expected bytes.",
            "a value of another kind",
            CORRECT_SCHEMA,
        ),
        (
            {},
            {"rgb": [floats([1, 2]), byte_strings(b"ab")]},
            "frame 1 of rgb holds floats, expected bytes.",
            "a value of another kind",
            CORRECT_SCHEMA,
        ),
    ],
)
def test_a_record_that_the_schema_does_not_fit_is_named(context, lists, problem, kind, hint):
    context = {k: v for k, v in (CONTEXT | context).items() if v is not None}
    lists = {k: v for k, v in (FRAMES | lists).items() if v is not None}

    with pytest.raises(BadRecord) as error:
        decode(record(context, lists), make_schema(rgb=(2, UINT8), audio=(1, UINT8)))

    assert str(error.value) == f"a.tfrecord, record 3: {problem}\n{hint}"
    assert (error.value.path, error.value.number) == (PATH, 3)
    assert error.value.kind == kind


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize(
    ("values", "problem", "hint"),
    [
        ([1.0, NAN], "frame 2 of rgb holds nan in video 'v'.", MAKE_AGAIN),
        ([-INFINITY, 1.0], "frame 2 of rgb holds -inf in video 'v'.", MAKE_AGAIN),
        ([1.0], "frame 2 of rgb has 1 features, the schema says 2.", CORRECT_SCHEMA),
    ],
)
def test_floats_that_are_not_finite_or_too_few_are_named(values, problem, hint, is_packed):
    rows = [floats([0.0, 0.5]), floats(values, packed=is_packed)]

    with pytest.raises(BadRecord) as error:
        decode(record(CONTEXT, {"rgb": rows}), make_schema(rgb=(2, FLOAT32)))

    assert str(error.value) == f"a.tfrecord, record 3: {problem}\n{hint}"


def test_a_vector_in_two_parts_is_one_longer_vector_and_not_two_frames():
    parts = floats([1, 2]) + floats([3, 4])  # protobuf joins the lists of one feature

    with pytest.raises(BadRecord) as error:
        decode(record(CONTEXT | {"rgb": parts}), make_schema("video", rgb=(2, FLOAT32)))

    assert str(error.value) == (
        "a.tfrecord, record 3: frame 1 of rgb has 4 features, the schema says 2.\n" + CORRECT_SCHEMA
    )


def test_integers_where_floats_belong_are_named():
    with pytest.raises(BadRecord) as error:
        decode(record(CONTEXT | {"rgb": integers([1, 2])}), make_schema("video", rgb=(2, FLOAT32)))

    assert str(error.value) == (
        "a.tfrecord, record 3: frame 1 of rgb holds integers, expected floats.\n" + CORRECT_SCHEMA
    )


@pytest.mark.parametrize(
    ("encoded", "keys"),
    [(b"", "no keys"), (record(CONTEXT | {"audio": floats([1])}), "audio, id, labels")],
)
def test_keys_of_a_record_without_feature_lists_are_named(encoded, keys):
    schema = make_schema("video", rgb=(2, FLOAT32)).model_copy(update={"id_key": "name"})

    with pytest.raises(BadRecord) as error:
        decode(encoded, schema)

    assert str(error.value) == (
        f"a.tfrecord, record 3: it has no 'name' where the schema says (found {keys}).\n"
        + CORRECT_SCHEMA
    )


@pytest.mark.parametrize(
    "encoded",
    [b"\xff\xff", record(CONTEXT | {"labels": b"\x0a\xff"}, FRAMES)],
    ids=["record", "feature"],
)
def test_bytes_that_protobuf_cannot_parse_are_named(encoded):
    with pytest.raises(BadRecord) as error:
        decode(encoded, make_schema(rgb=(2, UINT8), audio=(1, UINT8)))

    assert (
        str(error.value)
        == f"a.tfrecord, record 3: it is neither an Example nor a SequenceExample.\n{MAKE_AGAIN}"
    )
    assert error.value.kind == "bytes that are no Example"
