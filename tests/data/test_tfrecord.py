import struct

import pytest
from crc32c import crc32c

from ensemble_kit.data.tfrecord import BadRecord, numbered_records, read_records, write_records
from ensemble_kit.errors import OutputError, RecordError

PAYLOADS = [b"one", b"", b"three" * 7]
COPY_AGAIN = "Copy the file again from where it is whole, or leave it out with --skip-bad-records."


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_records(path, PAYLOADS, force=False)
    return path


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def read(path):
    return [bytes(record) for record in read_records(path)]


def test_writes_the_published_framing(path):
    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)

    expected = b""
    for payload in PAYLOADS:
        length = struct.pack("<Q", len(payload))
        expected += length + masked(length) + payload + masked(payload)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("block_bytes", [1, 13, 20, 1 << 20])
def test_reads_back_what_was_written_whatever_is_read_at_once(path, block_bytes):
    records = list(
        read_records(path, block_bytes=block_bytes)
    )  # all are held, so none may lie where another is read into

    assert [bytes(record) for record in records] == PAYLOADS


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "a.tfrecord"
    payloads = [bytes([number]) * 300_000 for number in range(20)]  # blocks of 1 MiB are read
    write_records(path, payloads, force=False)
    records = read_records(path)
    assert bytes(next(records)) == payloads[0]
    with path.open("rb+") as file:
        file.truncate(1_500_000)

    with pytest.raises(BadRecord) as error:
        list(records)

    assert str(error.value) == (
        f"{path}, record 5: the file ends within it: 300004 bytes expected, 299924 left.\n"
        f"{COPY_AGAIN}"
    )


def test_an_existing_file_is_kept(path):
    with pytest.raises(OutputError, match="exists already"):
        write_records(path, [], force=False)

    assert read(path) == PAYLOADS


def test_a_changed_byte_of_a_payload_is_found_unless_checksums_are_off(path):
    damage(path, 12)  # the first byte of the first payload

    with pytest.raises(BadRecord) as error:
        read(path)
    assert str(error.value) == (
        f"{path}, record 1: its 3 bytes differ from their checksum.\n{COPY_AGAIN}"
    )
    assert [bytes(r) for r in read_records(path, check_crc=False)][1:] == PAYLOADS[1:]


def test_a_changed_length_is_found(path):
    damage(path, 19 + 16 + 2)  # the length of the third record

    with pytest.raises(BadRecord) as error:
        read(path)

    assert str(error.value) == (
        f"{path}, record 3: its length differs from its checksum; nothing after it can be read.\n"
        f"{COPY_AGAIN}"
    )


def test_a_file_of_another_format_is_named_as_such(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("VideoId,Labels\nabcd,1 2 3\n")

    with pytest.raises(BadRecord) as error:
        read(path)

    assert str(error.value) == (
        f"{path}, record 1: it does not start like a TFRecord.\n"
        "Name TFRecord files; gzipped ones end in .gz."
    )


@pytest.mark.parametrize(
    ("lost", "expected", "left"),
    [(1, 39, 38), (41, 12, 10)],  # within the payload and its checksum; within what precedes it
)
def test_a_file_that_ends_early_is_found(path, lost, expected, left):
    path.write_bytes(path.read_bytes()[:-lost])

    with pytest.raises(BadRecord) as error:
        read(path)

    assert str(error.value) == (
        f"{path}, record 3: the file ends within it: {expected} bytes expected, {left} left.\n"
        f"{COPY_AGAIN}"
    )


def test_reading_goes_on_after_a_bad_payload_but_not_after_a_bad_length(path):
    bad = []
    damage(path, 12)
    damage(path, 19 + 16 + 2)

    good = [(n, bytes(r)) for n, r in numbered_records(path, on_bad=bad.append)]

    assert good == [(2, PAYLOADS[1])]
    assert [error.number for error in bad] == [1, 3]
    assert [error.kind for error in bad] == [
        "bytes that differ from their checksum",
        "a length that differs from its checksum",
    ]


def test_an_empty_file_is_an_error_even_where_bad_records_are_skipped(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.touch()

    with pytest.raises(RecordError) as error:
        list(numbered_records(path, on_bad=lambda _: None))

    assert str(error.value) == (
        f"{path} is empty.\nCopy the file again from where it is whole, or leave it out."
    )


def test_a_missing_file_is_an_error_even_where_bad_records_are_skipped(tmp_path):
    path = tmp_path / "a.tfrecord"

    with pytest.raises(RecordError) as error:
        list(numbered_records(path, on_bad=lambda _: None))

    assert str(error.value) == (
        f"{path} cannot be read: No such file or directory.\nName files that you may read."
    )
