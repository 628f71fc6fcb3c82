"""Gzipped files, read as if they were not: in constant memory, and within a bound.

A megabyte of gzip can hold a gigabyte of zeros. Text and features shrink to a tenth at best, so a
file that grows a hundredfold was made to fill a memory or a disk, and is refused on the way.
"""

import errno
import gzip
import io
import os
import zlib
from pathlib import Path
from typing import BinaryIO

GZIP = b"\x1f\x8b\x08"  # how a file starts that is compressed by the one method gzip has
MOST_TIMES = 100  # how many times its size a file may hold
ALWAYS_ALLOWED = 2**26  # bytes: a small file of much the same lines may shrink further


def is_gzipped(path: Path) -> bool:
    """Return whether a file starts as gzip's do, whatever its name.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def open_text(path: Path, *, newline: str | None = None) -> io.TextIOWrapper:
    """Open a text file in UTF-8, with or without a byte order mark, gzipped or not.

    Args:
        path: The file.
        newline: As ``open`` takes it.

    Raises:
        OSError: The file cannot be opened; later, that its gzip stream is damaged or holds more
            than ``expanded`` allows.
    """
    if not is_gzipped(path):
        return path.open(encoding="utf-8-sig", newline=newline)
    file = path.open("rb")
    stream = expanded(file, os.fstat(file.fileno()).st_size)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def expanded(
    file: BinaryIO, num_bytes: int, *, always_allowed: int = ALWAYS_ALLOWED
) -> io.BufferedReader:
    """Return what a gzipped file holds, as a file that is read forwards; closing it closes both.

    Args:
        file: The gzipped bytes.
        num_bytes: How many there are.
        always_allowed: How many bytes it may hold in any case.

    Raises:
        OSError: While it is read: the stream is damaged, ends early, or holds more than
            ``MOST_TIMES`` its bytes and more than ``always_allowed``.
    """
    return io.BufferedReader(_Expanded(file, max(always_allowed, MOST_TIMES * num_bytes)))


class _Expanded(io.RawIOBase):
    def __init__(self, file: BinaryIO, allowed: int) -> None:
        self._file = file
        self._stream = gzip.GzipFile(fileobj=file)
        self._left = allowed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            content = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(errno.EIO, f"its gzip stream is damaged ({error})") from error
        self._left -= len(content)
        if self._left < 0:
            raise OSError(errno.EFBIG, f"it holds more than {MOST_TIMES} times its own size")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()
