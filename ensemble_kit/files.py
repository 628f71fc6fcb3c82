"""Files written aside and renamed, hashes, sizes."""

import filecmp
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os.path import exists, isdir
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from ensemble_kit.choices import AnyPath
from ensemble_kit.errors import InputError, OutputError, SizeLimitError

LOGGER = logging.getLogger(__name__)
UNITS: Mapping[str, int] = MappingProxyType(
    {
        "bytes": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9,
        "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    }
)  # fmt: skip
BINARY, DECIMAL = ("GiB", "MiB", "KiB"), ("GB", "MB", "KB")
LARGEST_SIZE = 2**63 - 1  # no file system has a larger file
LONGEST_NAME = 255  # bytes that the common file systems allow in a name
PART = ".kit.part"  # the end of the name of a file that is being written
KEPT_OF_NAME = 100  # bytes of the final name that such a file's name repeats
KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def each_path(paths: AnyPath | Iterable[AnyPath]) -> list[str]:
    """Return paths as text; one path alone, which might be taken for its letters, is a list too."""
    listed = [paths] if isinstance(paths, str | os.PathLike) else paths
    return [os.fspath(path) for path in listed]


def refuse_overwrite(path: Path, *, force: bool) -> None:
    """Raise ``OutputError`` unless ``path`` may be written.

    It may not where it exists and ``force`` is False, where it is no file but a folder, a device, a
    pipe or a socket, which ``force`` does not replace either, where its name is too long, and where
    it is ``-``, which people give for standard output.
    """
    refuse_standard_output(path)
    size = len(os.fsencode(path.name))
    if size > LONGEST_NAME:
        raise OutputError(
            f"{path} has a name of {size} bytes; file systems allow {LONGEST_NAME}.",
            hint="Choose a shorter name.",
        )
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink() and not force:
            raise OutputError(
                f"{path} is a link to {os.readlink(path)}, which does not exist.",
                hint="Name another output, or write the file that it links to with --force.",
            ) from None
        return
    except OSError as error:
        _refuse(path, error)
    for is_kind, kind in KINDS:
        if is_kind(mode):
            raise OutputError(
                f"{path} is {kind}, not a file.", hint="Name a file; only files are replaced."
            )
    if not force:
        raise OutputError(
            f"{path} exists already.", hint="Name another output, or replace it with --force."
        )


def refuse_standard_output(path: Path) -> None:
    """Raise ``OutputError`` for ``-``, which people give for standard output."""
    if path == Path("-"):
        raise OutputError(
            "- stands for standard output, but this file is read again after it is written.",
            hint="Name a file; only predict prints with -o -.",
        )


def require_suffix(path: Path, suffix: str) -> None:
    """Raise ``OutputError`` unless a file's name ends as files of its format do, in any case."""
    refuse_standard_output(path)
    if path.suffix.lower() != suffix:
        raise OutputError(
            f"{path} does not end in {suffix}, the format that it would be written in.",
            hint=f"Name a file that ends in {suffix}.",
        )


@contextmanager
def written_aside(path: Path, *, force: bool, keep_same: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends without an error.

    The file is flushed to the disk before it is renamed, and its folder after that, so ``path``
    holds the old bytes or the new ones and never a part of either, whenever the process or the
    machine stops. A link is followed: the file that it links to is replaced, and the link stays.

    A process that is killed cannot remove its temporary file. The next one that writes into the
    folder does, which is why the file stays locked while it is written: the system unlocks it
    when the process ends in whatever way.

    Args:
        path: The file to write; missing folders are made.
        force: Whether an existing file may be replaced.
        keep_same: Whether an existing file may be one of the same bytes, as a command leaves it
            that is stopped between this file and its next.

    Raises:
        OutputError: ``path`` may not be written, or the disk refuses the file.
    """
    refuse_overwrite(path, force=force or keep_same)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        handle, aside = _locked_part(target)
    except OSError as error:
        _refuse(path, error)
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the team
        is_same = keep_same and exists(target) and filecmp.cmp(aside, target, shallow=False)
        refuse_overwrite(path, force=force or is_same)
        aside.replace(target)
        _flush_folder(target.parent)
        LOGGER.info("wrote %s, %s bytes", path, f"{target.stat().st_size:,}")
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()
        os.close(handle)


@contextmanager
def removed_on_failure(*paths: Path) -> Iterator[None]:
    """Remove files that a block has made, and folders for them alone, if it ends in an error."""
    files = [path for path in paths if not os.path.lexists(path)]
    parents = {parent for path in files for parent in path.absolute().parents}
    folders = [folder for folder in parents if not exists(folder)]
    try:
        yield
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            with suppress(OSError):  # something else is in it
                folder.rmdir()
        raise


@contextmanager
def folder_written_aside(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; move it there when the block ends without an error.

    So ``path`` appears whole or not at all. The temporary folder of a process that was killed is
    removed by the next one that writes ``path``.

    Args:
        path: The folder to make; it may exist where it is empty.
        force: Whether a folder may be replaced that holds ``schema.toml`` and files of records.

    Raises:
        OutputError: ``path`` may not be written, or the disk refuses a file.
    """
    _refuse_folder(path, force=force)
    start = f".{path.name[:KEPT_OF_NAME]}."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"{start}*{PART}"):
            _remove_abandoned_folder(stale)
        aside = Path(tempfile.mkdtemp(prefix=start, suffix=PART, dir=path.parent))
        handle = os.open(aside, os.O_RDONLY)
        _is_locked(handle, waits=True)
    except OSError as error:
        _refuse(path, error)
    try:
        yield aside
        for folder, _, names in os.walk(aside):
            for name in names:
                _flush_file(Path(folder, name))
        aside.chmod(0o777 & ~_umask())
        _refuse_folder(path, force=force)
        if os.path.exists(path):
            shutil.rmtree(path)
        aside.replace(path)
        _flush_folder(path.parent)
        LOGGER.info("wrote %s", path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(handle)


def _refuse_folder(path: Path, *, force: bool) -> None:
    """Raise ``OutputError`` unless a folder may be made or replaced."""
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path) or path.is_symlink():
        raise OutputError(f"{path} is not a folder.", hint="Name a folder that can be made.")
    held = [each for each in path.rglob("*") if not os.path.isdir(each)]
    if held and not force:
        raise OutputError(
            f"{path} holds files already.",
            hint="Name another output, or replace it with --force.",
        )
    for each in held:
        if each.suffix != ".tfrecord" and each.name not in ("schema.toml", "label_names.csv"):
            raise OutputError(
                f"{each} is no file of records, and would be lost with {path}.",
                hint="Name another output, or move the file.",
            )


def _remove_abandoned_folder(folder: Path) -> None:
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            if _is_locked(handle, waits=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _flush_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _refuse(path: Path, error: OSError) -> NoReturn:
    is_blocked = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "a file is in the place of its folder" if is_blocked else error.strerror
    raise OutputError(
        f"{path} cannot be written: {reason}.", hint="Name a folder you may write to."
    ) from error


def _unwritten(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}.",
        hint="Free some space or name another folder; nothing was left half-written.",
    )


def _locked_part(target: Path) -> tuple[int, Path]:
    """Make a file beside ``target`` and lock it; another process may remove it in between."""
    start = os.fsencode(target.name)[:KEPT_OF_NAME].decode(errors="ignore")
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{start}.", suffix=PART, dir=target.parent)
        _is_locked(handle, waits=True)
        aside = Path(name)
        if exists(aside):
            return handle, aside
        os.close(handle)


def _is_locked(handle: int, *, waits: bool) -> bool:
    """Lock an open file until it is closed or its process ends; return whether that worked.

    It does not where another process has locked it, nor on a system or a disk without locks, where
    no file is therefore taken for abandoned.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in a folder that no living process has locked."""
    for part in folder.glob(f".*{PART}"):
        with suppress(OSError):  # another process was faster, or it is not ours to remove
            if stat.S_ISREG(part.lstat().st_mode):
                with part.open("rb+") as file:
                    if _is_locked(file.fileno(), waits=False):
                        part.unlink()


def _flush_folder(folder: Path) -> None:
    """Have the disk keep a rename; file systems that cannot flush a folder need not."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    For a folder, such as one of predictions, it is that of its files' names and hashes.

    Raises:
        InputError: The file cannot be read.
    """
    if isdir(path):
        files = sorted(each for each in path.iterdir() if not each.name.startswith("."))
        lines = "".join(f"{sha256_of(each)}  {each.name}\n" for each in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error


class Size(int):
    """A number of bytes that remembers the unit in which a person typed it.

    Attributes:
        unit: One of ``UNITS``.
    """

    unit: str

    def __new__(cls, num_bytes: int, unit: str) -> "Size":
        """Make a number of bytes."""
        size = super().__new__(cls, num_bytes)
        size.unit = unit
        return size

    def __reduce__(self) -> tuple[type["Size"], tuple[int, str]]:
        """Return what a copy in another process is made of."""
        return Size, (int(self), self.unit)


def parse_size(text: str) -> Size:
    """Read a number of bytes such as ``1GiB`` (2^30), ``1GB`` (10^9), ``995 MiB`` or ``4000``.

    Raises:
        SizeLimitError: The text is not a positive number with one of these units.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match:
        typed = match[2].upper() or "BYTES"
        unit = next((unit for unit in UNITS if unit.upper() == typed), None)
        num_bytes = int(float(match[1]) * UNITS[unit]) if unit else 0
        if unit and 1 <= num_bytes <= LARGEST_SIZE:
            return Size(num_bytes, unit)
    raise SizeLimitError(
        f"{text[:80]!r} is not a size.",
        hint="Write a number and a unit: 1GiB (2^30 bytes), 1GB (10^9 bytes), 995MiB.",
    )


def format_size(num_bytes: int, *, like: int | None = None) -> str:
    """Write a number of bytes for people: ``994.1 MiB``, ``12.0 KiB``, ``17 bytes``.

    What a person typed is written in the same unit, and what is compared with it in units of the
    same kind: 10 MB that a file of 9.6 MiB fits into would have to be converted first.

    Args:
        num_bytes: How many there are.
        like: What the number will be compared with.
    """
    if isinstance(num_bytes, Size) and num_bytes.unit in (*BINARY, *DECIMAL):
        return f"{num_bytes / UNITS[num_bytes.unit]:.1f} {num_bytes.unit}"
    is_decimal = isinstance(like, Size) and like.unit in DECIMAL
    for unit in DECIMAL if is_decimal else BINARY:
        if abs(num_bytes) >= UNITS[unit]:
            return f"{num_bytes / UNITS[unit]:.1f} {unit}"
    return f"{int(num_bytes)} bytes"


def format_of_limit(num_bytes: int, limit: int) -> str:
    """Write a size beside the limit that it keeps, in units alike: ``9.4 MB of 10.0 MB``."""
    return f"{format_size(num_bytes, like=limit)} of {format_size(limit)}"
