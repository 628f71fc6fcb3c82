"""A record's values by their keys, as views into it.

Writers lay a record out in one way: features or feature lists, in them entries, in each a key and
then its value. Such records are taken apart here without a copy; the frames are nearly all of a
record's bytes, and protobuf copies them twice. Whatever looks any other way goes to protobuf.
"""

from collections.abc import Mapping, Sequence

from ensemble_kit.data.protos import RawExample

Features = Mapping[bytes, Sequence[bytes | memoryview]]

CONTEXT, FEATURE_LISTS = 0x0A, 0x12  # protobuf's tags: the field's number and "bytes follow"
ENTRY, KEY, VALUE = 0x0A, 0x0A, 0x12
LENGTH_BITS = 35  # of a length in five bytes; a longer one is left to protobuf


class _Unusual(Exception):  # noqa: N818 - never leaves this module
    """The record has a layout that this module does not handle."""


def split(record: bytes | memoryview) -> tuple[Features, Features]:
    """Return a record's context and feature lists: the parts of each value by its key.

    Raises:
        google.protobuf.message.DecodeError: The bytes are no message.
    """
    try:
        return _views(memoryview(record))
    except (_Unusual, IndexError):
        example = RawExample.FromString(record)
        return (
            {entry.key: entry.value for entry in example.context.feature},
            {entry.key: entry.value for entry in example.feature_lists.feature},
        )


def _views(record: memoryview) -> tuple[Features, Features]:
    context: dict[bytes, tuple[memoryview]] = {}
    feature_lists: dict[bytes, tuple[memoryview]] = {}
    position, size = 0, len(record)
    while position < size:
        tag = record[position]
        if tag != CONTEXT and tag != FEATURE_LISTS:
            raise _Unusual
        features = context if tag == CONTEXT else feature_lists
        length, position = _length(record, position + 1)
        end = position + length
        while position < end:
            if record[position] != ENTRY:
                raise _Unusual
            length, position = _length(record, position + 1)
            stop = position + length
            if record[position] != KEY:
                raise _Unusual
            length, position = _length(record, position + 1)
            key = bytes(record[position : position + length])
            position += length
            if record[position] != VALUE:
                raise _Unusual
            length, position = _length(record, position + 1)
            if position + length != stop:
                raise _Unusual
            features[key] = (record[position:stop],)
            position = stop
        if position != end:
            raise _Unusual
    if position != size:
        raise _Unusual
    return context, feature_lists


def _length(record: memoryview, position: int) -> tuple[int, int]:
    """Return the number written at a position, seven bits a byte, and the position after it."""
    value = record[position]
    position += 1
    if value < 0x80:
        return value, position
    value &= 0x7F
    for shift in range(7, LENGTH_BITS, 7):
        byte = record[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Unusual
