import pytest
from example_bytes import byte_strings, entry, frame_record, integers, message, record
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ensemble_kit.data import fields
from ensemble_kit.data.fields import split
from ensemble_kit.data.protos import RawExample

FRAMES = [byte_strings(bytes(range(200)) * 2)] * 3
USUAL = record(
    {"id": byte_strings(b"v"), "labels": integers([1, 300]), "": b""}, {"rgb": FRAMES, "audio": []}
)
TWICE = record({"id": b"a"}) + record({"id": b"b"}, {"rgb": FRAMES}) + record({}, {"rgb": []})


def by_protobuf(encoded):
    parsed = RawExample.FromString(encoded)
    return tuple(
        {entry.key: list(entry.value) for entry in features.feature}
        for features in (parsed.context, parsed.feature_lists)
    )


@st.composite
def damaged(draw):
    """Bytes that are a record but for a few changes, each of one byte."""
    encoded = bytearray(draw(st.sampled_from([USUAL[:90], USUAL, TWICE])))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, min(len(encoded), 60) - 1))
        kind = draw(st.sampled_from(["change", "insert", "remove", "end"]))
        if kind == "end":
            del encoded[place + 1 :]
        elif kind == "remove" and len(encoded) > 1:
            del encoded[place]
        else:
            byte = draw(st.sampled_from([0, 1, 10, 18, 127, 128, 255]) | st.integers(0, 255))
            encoded[place : place + (kind == "change")] = bytes([byte])
    return bytes(encoded)


KEY, VALUE = message(1, b"id"), message(2, b"abc")


@settings(deadline=None, max_examples=100)
@given(damaged())
@example(b"")
@example(message(3, message(1, message(1, KEY + VALUE))))  # fields of other numbers
@example(message(1, message(2, KEY + VALUE)))
@example(message(1, message(1, message(3, b"id") + VALUE)))
@example(message(1, message(1, KEY + message(3, b"abc"))))
@example(message(1, message(1, KEY + VALUE + message(3, b"more"))))
@example(message(1, message(1, VALUE + KEY)))
@example(message(1, message(1, KEY + VALUE + VALUE)))
@example(message(1, message(1, KEY + VALUE))[:-1])  # ends early
@example(b"\x0a\x03" + message(1, KEY + VALUE))  # an entry longer than its context
@example(message(1, entry("id", b"a"), overlong=True))
@example(b"\x0a\x80\x80\x80\x80\x80\x00")
def test_any_bytes_are_split_as_protobuf_splits_them(encoded):
    try:
        expected = by_protobuf(encoded)
    except DecodeError:
        with pytest.raises(DecodeError):
            split(encoded)
        return

    found = tuple(
        {k: [bytes(part) for part in v] for k, v in part.items()} for part in split(encoded)
    )

    assert found == expected


def test_a_usual_record_is_split_into_views_of_its_own_bytes(monkeypatch):
    monkeypatch.setattr(fields, "RawExample", None)  # it is not asked

    encoded = bytearray(frame_record("v", [1], rgb=[[1, 2], [3, 4]]))
    _, lists = split(encoded)
    (view,) = lists[b"rgb"]
    encoded[encoded.index(b"\x03\x04")] = 9

    assert bytes(view).endswith(b"\x09\x04")
