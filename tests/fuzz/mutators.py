"""Damage to bytes, to text and to trees of values, drawn from a ``random.Random``.

A tree is what JSON holds. ``Verbatim`` is a leaf whose text is written as it stands, for what no
writer would write: a number of 5,000 digits, brackets 5,000 deep, ``NaN``.
"""

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any


class Verbatim(str):
    """Text that stands in JSON or TOML in the place of a value, without quotes."""


Damage = Callable[[Random, bytes], bytes]
DEEP = 5_000  # beyond every reader's stack
NUMBERS = (0, -1, 1, 2, 20, 127, 256, 2**31 - 1, 2**31, 2**32, -(2**31), 2**53 + 1, 2**63 - 1,
           2**63,
           -(2**63) - 1, 10**12, 10**84, 0.5, -0.5, 1.5, 1e-320, 1e308)  # fmt: skip
TEXTS = ("", " ", "\n", "a\nb", "\0", "none", "0", "-1", "²", "٣", "\x1b]0;title\x07\x1b[2J",
         "```\n# x",
         "\ud800", "é" * 300, "../../x", "/", ".", "~", "%s%n{0}", "[red]x[/red]", "x" * 3_000,
         "\u202e\u2028\x85")  # fmt: skip
WORDS = tuple(
    map(
        Verbatim,
        ("9" * 5_000, "-" + "9" * 5_000, "1" + "_1" * 3_000, "NaN", "nan", "Infinity", "-Infinity",
         "inf", "1e400", "-1e400", "0x" + "f" * 4_000, "1979-05-27", "07:32:00", "true", "null",
         "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP,
         "{a={" * 300 + "}" * 600, "[[1], [2, [3]]]", '"\\ud800"', '"""'),
    )
)  # fmt: skip
BLOCKS = (b"\0", b"\xff" * 8, b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\n", b"\r", b",", b"\"",
          b"\x1b[0m",
          b"\0" * 64, (2**63).to_bytes(8, "little"), (2**31).to_bytes(4, "little"))  # fmt: skip
TOKEN = re.compile(r"[A-Za-z_]+|[0-9.+-]+|\s+|[^A-Za-z_0-9.+\-\s]")


def damage_bytes(random: Random, data: bytes) -> bytes:
    """Return bytes after one to three changes that know nothing of what the bytes mean."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(_BYTE_CHANGES)(random, data)
    return data


def _flipped(random: Random, data: bytes) -> bytes:
    if not data:
        return b"\0"
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _without_a_part(random: Random, data: bytes) -> bytes:
    start, stop = _part(random, data)
    return data[:start] + data[stop:]


def _with_a_part_twice(random: Random, data: bytes) -> bytes:
    start, stop = _part(random, data)
    return data[:stop] + data[start:]


def _with_a_block(random: Random, data: bytes) -> bytes:
    start, stop = _part(random, data)
    return data[:start] + random.choice(BLOCKS) + data[random.choice((start, stop)) :]


def _with_noise(random: Random, data: bytes) -> bytes:
    start, stop = _part(random, data)
    return data[:start] + random.randbytes(stop - start) + data[stop:]


def _part(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + int(2 ** random.uniform(0, 8)))


_BYTE_CHANGES: tuple[Damage, ...] = (
    _flipped, _flipped, _cut, _without_a_part, _with_a_part_twice, _with_a_block, _with_noise,
)  # fmt: skip


def damage_text(random: Random, data: bytes) -> bytes:
    """Return text after changes to its lines and words."""
    text = data.decode("utf-8", "surrogateescape")
    for _ in range(random.choice((1, 1, 2))):
        change = random.choice((_other_words, _other_words, _other_lines))
        text = change(random, text)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # another surrogate than those that stand for the file's own bytes
        return text.encode("utf-8", "surrogatepass")


def _other_words(random: Random, text: str) -> str:
    words = TOKEN.findall(text)
    if not words:
        return random.choice(TEXTS)
    place = random.randrange(len(words))
    hostile = str(random.choice(random.choice((NUMBERS, TEXTS, WORDS, words))))
    words[place : place + random.choice((0, 1, 1, 1, 3))] = [hostile]
    return "".join(words)


def _other_lines(random: Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    here, there = random.randrange(len(lines)), random.randrange(len(lines))
    change = random.randrange(5)
    if change == 0:
        del lines[here]
    elif change == 1:
        lines.insert(here, lines[there])
    elif change == 2:
        lines[here], lines[there] = lines[there], lines[here]
    elif change == 3:
        lines[here] = lines[here].rstrip("\n") + lines[there]
    else:
        lines[here] = str(random.choice(random.choice((TEXTS, WORDS)))) + "\n"
    return "".join(lines)


def places_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a tree as its container and its key there."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places_of(tree[key])


def damage_tree(random: Random, tree: Any) -> Any:
    """Return a tree after one to three changes; the tree itself may be changed."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(places_of(tree)) if isinstance(tree, dict | list) else []
        if not places or random.random() < 0.02:
            tree = any_value(random)
            continue
        container, key = random.choice(places)
        change = random.randrange(8)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[random.choice((*TEXTS, *map(str, container)))] = container.pop(key)
        elif change == 1:
            container.insert(key, container[key])
        elif change == 2:
            other, place = random.choice(places)
            container[key] = json.loads(
                write_json(other[place]) if _is_plain(other[place]) else "0"
            )
        elif change == 3:
            container[key] = random.choice(([container[key]], {"": container[key]}))
        else:
            container[key] = any_value(random)
    return tree


def _is_plain(value: Any) -> bool:
    return "Verbatim" not in repr(type(value)) and not isinstance(value, dict | list)


def any_value(random: Random) -> Any:
    """Return a value that no schema expects."""
    kinds = (NUMBERS, NUMBERS, TEXTS, WORDS, (None, True, False, [], {}, [[]], [None], {"": 0}))
    value = random.choice(random.choice(kinds))
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


def write_json(tree: Any) -> str:
    """Return JSON, with what is ``Verbatim`` as it stands."""
    held: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Verbatim):
            held.append(value)
            return f"@verbatim{len(held) - 1}@"
        if isinstance(value, dict):
            return {str(key): marked(each) for key, each in value.items()}
        return [marked(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(marked(tree))
    return re.sub(r'"@verbatim(\d+)@"', lambda match: held[int(match[1])], text)


def damage_json(random: Random, data: bytes) -> bytes:
    """Return JSON after changes to its values."""
    text = write_json(damage_tree(random, json.loads(data)))
    return text.encode("utf-8", "surrogatepass")


def damage_json_lines(random: Random, data: bytes) -> bytes:
    """Return a log of JSON objects after changes to the values of one line."""
    lines = data.splitlines()
    place = random.randrange(len(lines))
    lines[place] = damage_json(random, lines[place])
    return b"\n".join(lines) + random.choice((b"\n", b""))


def one_of(*changes: Damage) -> Damage:
    """Return a damage that is one of several, and sometimes blind damage after it."""

    def damage(random: Random, data: bytes) -> bytes:
        damaged = random.choice(changes)(random, data)
        return damage_bytes(random, damaged) if random.random() < 0.1 else damaged

    return damage
