"""Gzipped files are read as what they hold, and neither damage nor a bomb gets past the reader."""

import gzip
import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.errors import RecordError
from ensemble_kit.gzipped import expanded, is_gzipped, open_text
from ensemble_kit.texts import read_text


def read(path):
    with path.open("rb") as file, expanded(file, os.stat(path).st_size) as stream:
        return stream.read()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_members_one_after_the_other_are_one_file(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("gzip") / "a.gz"
    path.write_bytes(b"".join(map(gzip.compress, parts)))

    assert is_gzipped(path)
    assert read(path) == b"".join(parts)


def test_text_is_read_with_its_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "a"
    for content in ("\ufeffä\r\nb\n".encode(), gzip.compress("\ufeffä\r\nb\n".encode())):
        path.write_bytes(content)
        with open_text(path) as file:
            assert file.read() == "ä\nb\n"
        with open_text(path, newline="") as file:
            assert file.read() == "ä\r\nb\n"


@pytest.mark.parametrize("damage", ["short", "changed", "checksum"])
def test_a_damaged_stream_is_an_error_with_its_reason(tmp_path, damage):
    path = tmp_path / "a.csv.gz"
    content = bytearray(gzip.compress(os.urandom(300).hex().encode()))
    if damage == "short":
        del content[-20:]
    else:
        content[-6 if damage == "checksum" else 20] ^= 0x55
    path.write_bytes(content)

    with pytest.raises(RecordError, match="its gzip stream is damaged") as caught:
        read_text(path, RecordError, hint="Copy it again.")

    assert caught.value.problem.startswith(f"{path} cannot be read: its gzip stream is damaged (")


def test_a_bomb_is_refused_before_it_fills_anything():
    bomb = gzip.compress(bytes(10_000_000))

    with expanded(io.BytesIO(bomb), len(bomb)) as stream:
        assert len(stream.read()) == 10_000_000
    blocks = []
    stream = expanded(io.BytesIO(bomb), len(bomb), always_allowed=1000)
    with stream, pytest.raises(OSError, match="it holds more than 100 times its own size"):
        blocks.extend(iter(lambda: stream.read(1000), b""))
    assert 0 < sum(map(len, blocks)) <= 100 * len(bomb)
