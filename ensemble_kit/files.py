"""Files written aside, hashes and sizes. Imports only ``errors``."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ensemble_kit.errors import InputError, OutputError, SizeLimitError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip


def refuse_overwrite(path: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``path`` exists and may not be replaced."""
    if path.exists() and not force:
        raise OutputError(
            f"{path} exists already.", hint="Name another output, or replace it with --force."
        )


@contextmanager
def written_aside(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends well.

    The file is flushed to the disk before it is renamed, so ``path`` holds the old bytes or the
    new ones and never a part of either, whenever the process ends.

    Args:
        path: The file to write; missing folders are made.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    refuse_overwrite(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        is_blocked = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the place of its folder" if is_blocked else error.strerror
        raise OutputError(
            f"{path} cannot be written: {reason}.", hint="Name a folder you may write to."
        ) from error
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the team
        refuse_overwrite(path, force=force)
        aside.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Free some space or name another folder; nothing was left half-written.",
        ) from error
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error


def parse_size(text: str) -> int:
    """Read a number of bytes such as ``1GiB`` (2^30), ``1GB`` (10^9), ``995 MiB`` or ``4000``.

    Raises:
        SizeLimitError: The text is not a positive number with one of these units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    num_bytes = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if num_bytes < 1:
        raise SizeLimitError(
            f"{text!r} is not a size.",
            hint="Write a number and a unit: 1GiB (2^30 bytes), 1GB (10^9 bytes), 995MiB.",
        )
    return num_bytes


def format_size(num_bytes: int) -> str:
    """Write a number of bytes for people: ``994.1 MiB``, ``12.0 KiB``, ``17 bytes``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"
