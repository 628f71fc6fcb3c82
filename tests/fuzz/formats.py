"""Damage that knows a container: safetensors, ``.npy``, ZIP, protobuf, TFRecord.

What was changed is put together again, lengths and checksums too, so that the damage reaches the
reader of what is inside.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from crc32c import crc32c
from mutators import (
    NUMBERS,
    TEXTS,
    WORDS,
    Damage,
    damage_bytes,
    damage_text,
    damage_tree,
    write_json,
)

KEY = "ensemble_kit"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = (np.nan, np.inf, -np.inf, -0.0, -1e-30, -0.5, 1.5, 3.4e38, 1e-45)
INTEGERS = (-1, 0, 1, 5, 6, 127, 2**31 - 1, 2**40, 2**63 - 1, -(2**63))

# Safetensors: a header in JSON, then the tensors


def damage_safetensors(
    repair: Callable[[dict[str, Any], dict[str, list[Any]]], None] | None = None,
) -> Damage:
    """Return damage to metadata, types, shapes and values of a safetensors file of the kit.

    Args:
        repair: Called with the metadata and the tensors (type, shape, bytes) after the damage; may
            put in order what would hide it, such as a hash of the tensors.
    """

    def damage(random: Random, data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        texts = header.pop("__metadata__")
        metadata = json.loads(texts[KEY])
        tensors = {
            name: [entry["dtype"], entry["shape"], data[8 + size :][slice(*entry["data_offsets"])]]
            for name, entry in header.items()
        }
        kind = random.randrange(10)
        if kind == 0:  # a header that may contradict the tensors
            header = damage_tree(random, {"__metadata__": texts, **header})
            return _joined(write_json(header), data[8 + size :], random)
        if kind <= 3:
            metadata = damage_tree(random, metadata)
        elif tensors:
            for _ in range(random.choice((1, 1, 2, 3))):
                _damage_tensor(random, tensors)
        if repair is not None and random.random() < 0.8 and isinstance(metadata, dict):
            repair(metadata, tensors)
        return _written(metadata, tensors, random)

    return damage


def _damage_tensor(random: Random, tensors: dict[str, list[Any]]) -> None:
    if not tensors:
        return
    name = random.choice(list(tensors))
    held = tensors[name]
    kind = random.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[random.choice((*TEXTS, *tensors, name + ".int8_scale", "weights.x"))] = held
    elif kind == 2:
        held[0] = random.choice((*SIZES, "F8_E4M3", "U64", "C64"))
        _fill_up(held)
    elif kind == 3:
        shape = list(held[1]) or [1]
        place = random.randrange(len(shape))
        shape[place] = random.choice((0, 1, 2, shape[place] + 1, 4000))
        held[1] = random.choice((shape, shape[::-1], [], [*shape, 1], shape[1:], [0], [3, 0, 2]))
        _fill_up(held)
    elif kind == 4:
        held[2] = damage_bytes(random, held[2])[: len(held[2])].ljust(len(held[2]), b"\0")
    else:
        held[2] = _other_values(random, held[0], held[2])


def _fill_up(held: list[Any]) -> None:
    """Give a tensor as many bytes as its type and shape need."""
    size = SIZES.get(held[0], 1 if held[0].startswith("F8") else 8) * int(np.prod(held[1]))
    held[2] = (held[2] * (size // max(1, len(held[2])) + 1) or b"\0" * size)[:size].ljust(
        size, b"\0"
    )


def _other_values(random: Random, dtype: str, data: bytes) -> bytes:
    width = SIZES.get(dtype, 1)
    if not data or dtype == "BF16":
        return random.choice((data, b"\xff" * len(data), b"\x80\x7f" * (len(data) // 2)))
    types = {"F64": "f8", "F32": "f4", "F16": "f2", "BOOL": "u1", "U8": "u1"}
    array = np.frombuffer(data[: len(data) // width * width], types.get(dtype, f"i{width}")).copy()
    for _ in range(random.choice((1, 1, 2, len(array)))):
        value = random.choice(FLOATS if array.dtype.kind == "f" else INTEGERS)
        with np.errstate(all="ignore"):
            array[random.randrange(len(array))] = np.array(value).astype(array.dtype)
    return array.tobytes() + data[len(array) * width :]


def _written(metadata: Any, tensors: dict[str, list[Any]], random: Random) -> bytes:
    header: dict[str, Any] = {"__metadata__": {KEY: write_json(metadata)}}
    payload = b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        payload += data
    return _joined(write_json(header), payload, random)


def _joined(header: str, payload: bytes, random: Random) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    size = len(encoded)
    if random.random() < 0.05:
        size = random.choice((0, 1, size - 1, size + 1, 2**63, 100_000_001, 10**8))
    return size.to_bytes(8, "little") + encoded + payload


# NumPy: a magic, a version, a header that is a Python literal, then the array

DESCRIPTORS = ("<f4", ">f8", "<f2", "<f8", "|O", "<U3", "|S2", "<M8[ns]", "<m8[s]", "|V16", "<c8",
               "|b1",
               "<i8", "|u1", "<f16", "", "f", "<q", "<U0", "|V0", "<f4,<f4", "(2,)f4")  # fmt: skip
SHAPES = ("(4, 3)", "(3, 4)", "()", "(12,)", "(2, 2, 3)", "(0, 3)", "(4, 0)", "(-1, 3)", "(4,)",
          "4",
          "(4.0, 3)", "(True, True)", "(10**30, 1)", f"({10**30}, 1)", f"({2**62}, {2**62})",
          f"({2**40}, 3)", f"(3, {2**33})", "('4', 3)", "[4, 3]", "None", f"({'9' * 5000}, 1)",
          "(" * 200 + "4" + ",)" * 200, "(4, 3)" * 40)  # fmt: skip
DICTIONARIES = ("", "{}", "[]", "{'descr': '<f4'}", "{'descr': '<f4', 'fortran_order': False}",
                "\0",
                "{'descr': [('a', '<f4'), ('b', '<f4')], 'fortran_order': False, 'shape': (4,)}",
                "{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (4,)}",
                "{'descr': [], 'fortran_order': False, 'shape': (4, 3)}", "{[]: 1}", "{{}}",
                "not a literal(",
                "{'descr': '<f4', 'fortran_order': 1, 'shape': (4, 3)}", "-" * 900 + "1",
                "(" * 90, "é",
                "[" * 3000 + "]" * 3000, "{'descr': 3, 'fortran_order': False, 'shape': (4, 3)}",
                "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (4, 3)}",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), 'x': 1}")  # fmt: skip


def damage_npy(random: Random, data: bytes) -> bytes:
    """Return a ``.npy`` file after changes to its header; one that was cut short has none."""
    if len(data) < 8:
        return data
    version, start = data[6], 8
    width = 2 if version == 1 else 4
    size = int.from_bytes(data[start : start + width], "little")
    header = data[start + width :][:size].decode("latin1")
    array = data[start + width + size :]
    kind = random.randrange(5)
    if kind == 0:
        header = random.choice(DICTIONARIES)
    elif kind == 1:
        header = damage_text(random, header.encode()).decode("latin1")
    else:
        descriptor = random.choice((*DESCRIPTORS, "<f4", "<f4", "<f4"))
        shape = random.choice((*SHAPES, "(4, 3)"))
        order = random.choice((False, False, True, None))
        header = f"{{'descr': {descriptor!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    encoded = header.encode("utf-8", "surrogateescape")
    version = random.choice((1, 1, 1, 2, 3, 0, 4, 255))
    width = 2 if version == 1 else 4
    if len(encoded) >= 2 ** (8 * width):
        version, width = 2, 4
    length = len(encoded) if random.random() < 0.9 else random.choice((0, 5, 65_535, len(data)))
    magic = data[:6] + bytes([version, random.choice((0, 0, 0, 1))])
    return magic + length.to_bytes(width, "little") + encoded + array


# ZIP

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
NAMES = ("probabilities.npy", "ids.npy", "labels.npy", "label_names.npy", "probabilities", "ids",
         "labels", "x.npy", "/ids.npy", "é.npy", "", "../ids.npy")  # fmt: skip
OTHER_ARRAYS = (
    np.zeros((4, 3), "<f4"), np.zeros((4, 3), bool), np.zeros(4), np.zeros((0, 0)), np.array("x"),
    np.array(["a", "b", "c", "d"]), np.array([b"\xff", b"b", b"c", b"d"]), np.array(["a"] * 4),
    np.arange(4), np.zeros((4, 3), "<M8[s]"), np.zeros((4, 3), "<c8"), np.zeros(4, "<U2"),
    np.zeros((4, 3), "<U2"), np.zeros((4, 3), "|V3"), np.full((4, 3), np.nan), np.zeros((3, 4)),
    np.zeros(4, [("a", "<f4")]), np.array([["a", "b"], ["c", "d"]]), np.zeros((2, 2, 3)),
    np.array(["a", "b", "\ud800", "d"]), np.array(["a\nb", "\x1b[2J", "c,", " d"]),
)  # fmt: skip


def damage_npz(random: Random, data: bytes) -> bytes:
    """Return a ``.npz`` file after changes to its members."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(random.choice((0, 1, 1, 2))):
        place = random.randrange(len(members) + 1) % max(1, len(members))
        name, held = members[place] if members else ("ids.npy", b"")
        kind = random.randrange(7)
        if kind == 0 and members:
            del members[place]
        elif kind == 1:
            members.insert(place, (random.choice(NAMES), held))
        elif kind == 2 and members:
            members[place] = random.choice(NAMES), held
        elif kind == 3 and members:
            members[place] = name, damage_npy(random, held) if held[:1] == b"\x93" else b"x"
        elif kind == 4 and members:
            members[place] = name, damage_bytes(random, held)
        elif members:
            members[place] = name, npy_bytes(random.choice(OTHER_ARRAYS))
    return _zipped(random, members)


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Return an array as a ``.npy`` file."""
    held = io.BytesIO()
    np.lib.format.write_array(held, array, allow_pickle=False)
    return held.getvalue()


def _zipped(random: Random, members: list[tuple[str, bytes]]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        seen: set[str] = set()
        for name, data in members:
            if name in seen:
                continue  # zipfile warns of a name that is there twice
            seen.add(name)
            method = random.choice(COMPRESSIONS)
            archive.writestr(zipfile.ZipInfo(name or "x"), data, compress_type=method)
    whole = bytearray(held.getvalue())
    if random.random() < 0.4:  # fields of the local or the central headers, or what they compress
        signature = random.choice((b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"))
        places = [at for at in range(len(whole)) if whole[at : at + 4] == signature]
        if places:
            at = random.choice(places) + random.randrange(4, 46)
            block = random.choice((b"\xff\xff", b"\0\0", b"\x01\0", b"\x63\0", random.randbytes(4)))
            whole[at : at + len(block)] = block
    return bytes(whole)


# Protobuf, by its wire format


def read_message(data: bytes, depth: int = 0) -> list[list[Any]] | None:
    """Return a message's fields as [number, wire type, value]; None where these are no fields.

    A value of bytes that can be read as a message is one; so may be a text, which does no harm.
    """
    fields: list[list[Any]] = []
    position = 0
    try:
        while position < len(data):
            tag, position = _read_varint(data, position)
            number, wire = tag >> 3, tag & 7
            value: Any
            if wire == 0:
                value, position = _read_varint(data, position)
            elif wire in (1, 5):
                stop = position + (8 if wire == 1 else 4)
                value, position = data[position:stop], stop
            elif wire == 2:
                length, position = _read_varint(data, position)
                value = data[position : position + length]
                position += length
                inner = (
                    read_message(value, depth + 1) if 2 <= length < 2_000 and depth < 8 else None
                )
                value = inner if inner is not None else value
            else:
                return None
            if number == 0 or position > len(data):
                return None
            fields.append([number, wire, value])
    except IndexError:
        return None
    return fields


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError


def write_varint(number: int) -> bytes:
    """Return a number as protobuf writes it."""
    number &= 2**64 - 1
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def write_message(fields: list[list[Any]]) -> bytes:
    """Return the bytes of a message."""
    written = []
    for number, wire, value in fields:
        tag = write_varint(number << 3 | wire)
        if wire == 0:
            written.append(tag + write_varint(value))
        elif wire == 2:
            held = write_message(value) if isinstance(value, list) else value
            written.append(tag + write_varint(len(held)) + held)
        else:
            written.append(tag + value)
    return b"".join(written)


def damage_message(random: Random, data: bytes) -> bytes:
    """Return a message after one to three changes to its fields, at any depth."""
    fields = read_message(data)
    if fields is None:
        return damage_bytes(random, data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_field_places(fields))
        if not places:
            break
        holder, index = random.choice(places)
        field = holder[index]
        kind = random.randrange(7)
        if kind == 0:
            del holder[index]
        elif kind == 1:
            holder.insert(index, [*field])
        elif kind == 2:
            field[0] = random.choice((1, 2, 3, 5, 7, 13, 14, 19, 536_870_911))
        elif kind == 3:
            other, place = random.choice(places)
            if not isinstance(other[place][2], list):  # never a message into itself
                holder[index] = [*other[place]]
        else:
            _damage_field(random, field)
    return write_message(fields)


def _field_places(fields: list[list[Any]]) -> list[tuple[list[Any], int]]:
    places: list[tuple[list[Any], int]] = []
    for index, (_, _, value) in enumerate(fields):
        places.append((fields, index))
        if isinstance(value, list):
            places += _field_places(value)
    return places


def _damage_field(random: Random, field: list[Any]) -> None:
    _, wire, value = field
    if wire == 0:
        whole = [number for number in NUMBERS if isinstance(number, int)]
        field[2] = random.choice((*whole, value + 1, value ^ 1, *range(1, 24)))
    elif wire == 2 and isinstance(value, list):
        field[2] = random.choice((b"", [], damage_bytes(random, write_message(value)), value * 2))
    elif wire == 2:
        texts = [str(text).encode("utf-8", "surrogatepass") for text in (*TEXTS, *WORDS[:4])]
        blind = damage_bytes(random, value)
        field[2] = random.choice((b"", b"\xff\xfe", random.choice(texts), blind, value * 2))
    else:
        field[2] = random.randbytes(len(value))


# TFRecord


def damage_records(random: Random, data: bytes) -> bytes:
    """Return a TFRecord file after changes to a payload, its frame put in order again."""
    payloads = []
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        payloads.append(data[position + 12 : position + 12 + length])
        position += 16 + length
    place = random.choice((0, random.randrange(len(payloads))))
    payloads[place] = damage_message(random, payloads[place])
    if random.random() < 0.1:
        payloads = payloads[: place + 1]
    framed = [_framed(payload) for payload in payloads]
    if random.random() < 0.1:
        length = random.choice((0, 2**31, 2**63 - 1, 2**64 - 1, 10**12)).to_bytes(8, "little")
        framed.insert(place, length + struct.pack("<I", _masked_crc(length)) + b"\0" * 40)
    return b"".join(framed)


def _framed(payload: bytes) -> bytes:
    length = len(payload).to_bytes(8, "little")
    return (
        length
        + struct.pack("<I", _masked_crc(length))
        + payload
        + struct.pack("<I", _masked_crc(payload))
    )


def _masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
