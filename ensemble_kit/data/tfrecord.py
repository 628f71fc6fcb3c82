"""TFRecord framing: length, its checksum, payload, its checksum.

A record is ``uint64 length``, ``uint32 masked CRC32C of the length``, ``length`` bytes, ``uint32
masked CRC32C of the bytes``, all little-endian; there is no file header.
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from ensemble_kit.data.remote import open_ready
from ensemble_kit.errors import RecordError
from ensemble_kit.files import written_aside
from ensemble_kit.gzipped import GZIP

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
BLOCK_BYTES = 1 << 20  # read at once

COPY_AGAIN = "Copy the file again from where it is whole, or leave it out with --skip-bad-records."


class BadRecord(RecordError):  # noqa: N818 - a record that is bad, which may be skipped
    """One record that cannot be used, in a file whose other records may be.

    Args:
        path: The file.
        number: Which record of the file, counted from 1.
        problem: What is wrong with it.
        kind: What kind of problem it is, to count alike ones together.
        hint: One imperative sentence.
    """

    def __init__(self, path: Path, number: int, problem: str, *, kind: str, hint: str) -> None:
        super().__init__(f"{path}, record {number}: {problem}", hint=hint)
        self.path = path
        self.number = number
        self.kind = kind


def refuse(error: BadRecord) -> None:
    """Raise the error: what happens to a bad record unless the caller skips it."""
    raise error


def read_records(
    path: Path, *, check_crc: bool = True, block_bytes: int = BLOCK_BYTES
) -> Iterator[memoryview]:
    """Yield the payload of each record of a file, as a view that copies nothing.

    Args:
        path: An uncompressed TFRecord file.
        check_crc: Whether both checksums are compared with the bytes.
        block_bytes: How much of the file is read at once; more where a record is larger.

    Raises:
        RecordError: The file is missing or empty.
        BadRecord: A record is truncated, or differs from its checksum.
    """
    for _, record in numbered_records(path, check_crc=check_crc, block_bytes=block_bytes):
        yield record


def numbered_records(
    path: Path,
    *,
    check_crc: bool = True,
    on_bad: Callable[[BadRecord], None] = refuse,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, memoryview]]:
    """Yield number, counted from 1, and payload of each good record of a file.

    ``on_bad`` is called with each bad one. If it returns, reading continues after a payload that
    differs from its checksum, and ends where the framing itself is broken: nothing after that
    place can be trusted.
    """
    try:
        with open_ready(path, FileIO) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise _empty(path)
            window = _Window(file, block_bytes)

            def header_at(position: int) -> memoryview:
                return window.bytes_at(position, HEADER.size)

            places = _framing(path, size, header_at, check_crc=check_crc, on_bad=on_bad)
            for number, (start, length) in enumerate(places, start=1):
                framed = window.bytes_at(start, length + FOOTER.size)
                if len(framed) < length + FOOTER.size:  # the file became shorter
                    return on_bad(_truncated(path, number, length + FOOTER.size, len(framed)))
                if check_crc and not matches_crc(framed):
                    on_bad(damaged(path, number, length))
                else:
                    yield number, framed[:length]
    except OSError as error:
        raise _unreadable(path, error) from error
    return None


class _Window:
    """The bytes of a file, read some at a time.

    They are not mapped: a file that becomes shorter under a mapping ends the process with a bus
    error. Each block is memory that nothing else is read into, so that views of it stay what they
    are after the next block.
    """

    def __init__(self, file: FileIO, block_bytes: int) -> None:
        self._file = file
        self._block_bytes = block_bytes
        self._start = 0
        self._block = memoryview(b"")

    def bytes_at(self, start: int, length: int) -> memoryview:
        """Return some bytes; fewer where the file ends before."""
        offset = start - self._start
        if offset < 0 or offset + length > len(self._block):
            self._file.seek(start)
            parts = []
            left = max(length, self._block_bytes)
            while left and (part := self._file.read(left)):  # a system reads 2 GiB at most
                parts.append(part)
                left -= len(part)
            self._start, offset = start, 0
            self._block = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
        return self._block[offset : offset + length]


class Shard(NamedTuple):
    """What the headers of a file's records say, without their payloads.

    Attributes:
        starts: ``(N,)``, int64: the byte at which the payload of each record starts.
        lengths: ``(N,)``, int64: the bytes of each payload.
        size: The bytes of the file.
        modified_ns: When it was last modified, in nanoseconds since 1970.
        sha256: A hash of the lengths and checksums of all records, as the file holds them. It
            stands for the file's content at the price of one small read a record.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    size: int
    modified_ns: int
    sha256: str


def locate_records(
    path: Path, *, check_crc: bool = True, on_bad: Callable[[BadRecord], None] = refuse
) -> Shard:
    """Return where each record of a file lies, and what the file is known by.

    Args:
        path: An uncompressed TFRecord file.
        check_crc: Whether each length is compared with its checksum; payloads are not read.
        on_bad: Called where the framing is broken; if it returns, the records before it count.

    Raises:
        RecordError: The file is missing or empty.
    """
    try:
        with BufferedReader(open_ready(path, FileIO)) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            digest = hashlib.sha256()

            def header_at(position: int) -> bytes:
                # the checksum before a header is read with it, so that hashing costs no more reads
                before = min(position, FOOTER.size)
                file.seek(position - before)
                read = file.read(before + HEADER.size)
                digest.update(read)
                return read[before:]

            places = list(_framing(path, size, header_at, check_crc=check_crc, on_bad=on_bad))
            file.seek(max(0, size - FOOTER.size))
            digest.update(file.read(FOOTER.size))  # of the last record
    except OSError as error:
        raise _unreadable(path, error) from error
    if not size:
        raise _empty(path)
    starts, lengths = np.array(places, np.int64).reshape(-1, 2).T.copy()
    return Shard(starts, lengths, size, status.st_mtime_ns, digest.hexdigest())


def is_gzipped_records(path: Path) -> bool:
    """Return whether a file is gzipped, whatever its name.

    A TFRecord file whose first payload has 559,903 bytes starts as gzip's files do; it is known by
    the checksum of that length.

    Raises:
        RecordError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not head.startswith(GZIP):
        return False
    return len(head) < HEADER.size or _masked_crc(head[:8]) != HEADER.unpack(head)[1]


def matches_crc(framed: bytes | memoryview) -> bool:
    """Return whether a payload agrees with the checksum that follows it; both are given as one."""
    end = len(framed) - FOOTER.size
    return FOOTER.pack(_masked_crc(framed[:end])) == framed[end:]


def _framing(
    path: Path,
    size: int,
    header_at: Callable[[int], bytes | memoryview],
    *,
    check_crc: bool,
    on_bad: Callable[[BadRecord], None],
) -> Iterator[tuple[int, int]]:
    """Yield start and length of each payload, up to the place where the framing is broken."""
    position, number = 0, 0
    while position < size:
        number += 1
        header = header_at(position)
        if len(header) < HEADER.size:
            return on_bad(_truncated(path, number, HEADER.size, len(header)))
        length, length_crc = HEADER.unpack(header)
        if check_crc and _masked_crc(header[:8]) != length_crc:
            return on_bad(_bad_length(path, number))
        start = position + HEADER.size
        position = start + length + FOOTER.size
        if position > size:
            return on_bad(_truncated(path, number, length + FOOTER.size, size - start))
        yield start, length
    return None


def write_records(path: Path, records: Iterable[bytes], *, force: bool) -> None:
    """Write a TFRecord file with both checksums.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    with written_aside(path, force=force) as aside, closing(RecordWriter(aside)) as writer:
        for record in records:
            writer.add(record)


class RecordWriter:
    """Writes a TFRecord file, record by record, with both checksums.

    Args:
        path: The file, which is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    @property
    def num_bytes(self) -> int:
        """How many bytes were written so far."""
        return self._file.tell()

    def add(self, record: bytes) -> None:
        """Write one record."""
        length = len(record).to_bytes(8, "little")
        self._file.write(length + FOOTER.pack(_masked_crc(length)))
        self._file.write(record)
        self._file.write(FOOTER.pack(_masked_crc(record)))

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        self._file.close()


def _masked_crc(data: bytes | memoryview) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # the format's mask


def damaged(path: Path, number: int, length: int) -> BadRecord:
    """Return the error for a payload that differs from its checksum."""
    return BadRecord(
        path,
        number,
        f"its {length} bytes differ from their checksum.",
        kind="bytes that differ from their checksum",
        hint=COPY_AGAIN,
    )


def _unreadable(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"{path} cannot be read: {error.strerror}.", hint="Name files that you may read."
    )


def _empty(path: Path) -> RecordError:
    return RecordError(
        f"{path} is empty.", hint="Copy the file again from where it is whole, or leave it out."
    )


def _truncated(path: Path, number: int, expected: int, found: int) -> BadRecord:
    return BadRecord(
        path,
        number,
        f"the file ends within it: {expected} bytes expected, {found} left.",
        kind="a file that ends within a record",
        hint=COPY_AGAIN,
    )


def _bad_length(path: Path, number: int) -> BadRecord:
    if number == 1:
        return BadRecord(
            path,
            number,
            "it does not start like a TFRecord.",
            kind="a file that is no TFRecord",
            hint="Name TFRecord files; gzipped ones end in .gz.",
        )
    return BadRecord(
        path,
        number,
        "its length differs from its checksum; nothing after it can be read.",
        kind="a length that differs from its checksum",
        hint=COPY_AGAIN,
    )
