"""Protobuf's wire format, field by field: https://protobuf.dev/programming-guides/encoding.

What is read is never in memory as a whole: fields are places in a file.
"""

from collections.abc import Iterator
from typing import BinaryIO

VARINT, BYTES = 0, 2
FIXED_SIZES = {1: 8, 5: 4}
KEY, VALUE = 1, 2  # of an entry that is a pair of texts
Place = tuple[int, int]  # where some bytes of a file begin and end


def varint(number: int) -> bytes:
    """Return a whole number as bytes, seven bits in each."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def number_field(field: int, number: int) -> bytes:
    """Return a field that is a whole number."""
    return varint(field << 3 | VARINT) + varint(number)


def head_of(field: int, size: int) -> bytes:
    """Return what stands before ``size`` bytes of a field."""
    return varint(field << 3 | BYTES) + varint(size)


def text_field(field: int, text: str) -> bytes:
    """Return a field that is a text."""
    return head_of(field, len(text.encode())) + text.encode()


def pair_field(field: int, key: str, value: str) -> bytes:
    """Return a field that is a pair of texts."""
    entry = text_field(KEY, key) + text_field(VALUE, value)
    return head_of(field, len(entry)) + entry


class DamagedError(Exception):
    """A field does not fit into what it is a part of."""


def fields(file: BinaryIO, place: Place) -> Iterator[tuple[int, int | Place]]:
    """Yield a message's fields: their number, and what it is or where its bytes lie."""
    for field, value, _ in whole_fields(file, place):
        yield field, value


def whole_fields(file: BinaryIO, place: Place) -> Iterator[tuple[int, int | Place, Place]]:
    """Yield a message's fields as ``fields`` does, and where each lies with what stands before."""
    position, stop = place
    while position < stop:
        start = position
        tag, position = read_varint(file, position, stop)
        field, wire = tag >> 3, tag & 7
        if wire == VARINT:
            number, position = read_varint(file, position, stop)
            yield field, number, (start, position)
            continue
        if wire == BYTES:
            length, position = read_varint(file, position, stop)
        else:
            length = FIXED_SIZES.get(wire, stop)  # other wires there are none
        if position + length > stop:
            raise DamagedError
        yield field, (position, position + length), (start, position + length)
        position += length


def read_varint(file: BinaryIO, position: int, stop: int) -> tuple[int, int]:
    """Return a whole number and where it ends."""
    file.seek(position)
    number = 0
    for index, byte in enumerate(file.read(min(10, stop - position))):
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return number, position + index + 1
    raise DamagedError


def read_varints(file: BinaryIO, place: Place) -> Iterator[int]:
    """Yield the whole numbers of a field that has many."""
    position, stop = place
    while position < stop:
        number, position = read_varint(file, position, stop)
        yield number


def read_bytes(file: BinaryIO, place: Place) -> bytes:
    """Return the bytes of a place."""
    file.seek(place[0])
    return file.read(place[1] - place[0])


def read_text(file: BinaryIO, place: Place) -> str:
    """Return a field that is a text."""
    return read_bytes(file, place).decode()


def read_pair(file: BinaryIO, place: Place) -> tuple[str, str]:
    """Return a field that is a pair of texts."""
    found = {
        field: read_text(file, text)
        for field, text in fields(file, place)
        if isinstance(text, tuple)
    }
    return found.get(KEY, ""), found.get(VALUE, "")
