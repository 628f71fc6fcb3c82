"""Where a search's table lies: in memory up to a bound, and past it in a file without a name.

The file is gone however the process ends, for no folder names it, so nothing is left over and no
other process can change it. Its rows are read and not mapped, as those of predictions are (see
``row_files``): pages of a mapped file count as the process's memory until the system wants them
back, so that the bound would say nothing.

Memory that a search takes beside its blocks is counted too where it grows with the videos: the
bounds of the candidates, and the pools of the mixtures that are measured together.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from os.path import isdir
from pathlib import Path
from threading import Lock
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.errors import OutputError
from ensemble_kit.files import format_size

SHARE = 2  # of the machine's memory, a half is the bound unless another is given
UNKNOWN_MEMORY = 16 << 30  # of a system that does not say what it has
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # what a container may have


class StoredRows:
    """A matrix in the file of a ``Storage``, of which one row after the other is read."""

    def __init__(self, storage: "Storage", offset: int, like: NDArray[Any]) -> None:
        self._storage = storage
        self._offset = offset
        self._dtype = like.dtype
        self.shape = like.shape

    def __getitem__(self, row: int) -> NDArray[Any]:
        """Return a row.

        Raises:
            OutputError: The disk does not give back what it was given.
        """
        values = np.empty(self.shape[1], self._dtype)
        self._storage.read(values, self._offset + row * values.nbytes)
        return values

    def taken(self, rows: Collection[int]) -> Mapping[int, NDArray[Any]]:
        """Return some rows by their numbers."""
        return {row: self[row] for row in sorted(rows)}


Rows: TypeAlias = NDArray[Any] | StoredRows | Mapping[int, NDArray[Any]]


class Storage:
    """Keeps matrices in memory up to a bound, and the others in a file.

    Args:
        memory: Maximum bytes of all that is kept in memory.
        folder: Where the file is, whose disk must have room; a folder above it where it does not
            exist yet.
    """

    def __init__(self, memory: int, folder: Path) -> None:
        self.memory = memory
        self.num_stored = 0
        self._left = memory
        self._folder = next(each for each in (folder, *folder.absolute().parents) if isdir(each))
        self._file: IO[bytes] | None = None
        self._lock = Lock()

    def takes(self, num_bytes: int) -> bool:
        """Return whether so many bytes more fit in memory, and count them if they do."""
        fits = num_bytes <= self._left
        self._left -= num_bytes if fits else 0
        return fits

    def reserve(self, num_bytes: int) -> None:
        """Count memory that is needed whether it fits or not."""
        self._left -= num_bytes

    def require(self, num_bytes: int) -> None:
        """Raise ``OutputError`` unless the disk has room for so many bytes more."""
        free = shutil.disk_usage(self._folder).free
        if num_bytes > free:
            raise OutputError(
                f"What does not fit in memory takes about {format_size(num_bytes)}, and "
                f"{self._folder} has {format_size(free)} left.",
                hint="Free some space, set TMPDIR to a folder on a larger disk, or raise --memory.",
            )

    def store(self, matrix: NDArray[Any]) -> StoredRows:
        """Write a matrix ``(rows, P)`` to the file.

        Raises:
            OutputError: The disk refuses it.
        """
        rows = StoredRows(self, self.num_stored, matrix)
        content = np.ascontiguousarray(matrix).reshape(-1).view(np.uint8).data
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            self._file.seek(self.num_stored)
            while content:
                content = content[self._file.write(content) :]  # a system writes 2 GiB at most
        except OSError as error:
            raise self._refused("written", error.strerror) from error
        self.num_stored += matrix.nbytes
        return rows

    def read(self, values: NDArray[Any], offset: int) -> None:
        """Fill an array from a place in the file; any thread may."""
        assert self._file is not None
        left = values.view(np.uint8).data
        try:
            with self._lock:
                self._file.seek(offset)
                while left:
                    count = self._file.readinto(left)  # type: ignore[attr-defined]
                    if not count:
                        raise self._refused("read", "it ends too early")
                    left = left[count:]
        except OSError as error:
            raise self._refused("read", error.strerror) from error

    def close(self) -> None:
        """Give the file's space back."""
        if self._file is not None:
            self._file.close()

    def _refused(self, verb: str, reason: str | None) -> OutputError:
        return OutputError(
            f"The file in {self._folder} of what does not fit in memory cannot be {verb}: "
            f"{reason}.",
            hint="Free some space, set TMPDIR to a folder on another disk, or raise --memory.",
        )


def storage_folder(output: Path) -> Path:
    """Return where what does not fit is kept: in ``TMPDIR`` where that is set, else by the output.

    The system's own temporary folder is often small, or memory itself.
    """
    named = os.environ.get("TMPDIR")
    return Path(named) if named and isdir(named) else output.parent


def default_memory(cgroup_limit: Path = CGROUP_LIMIT) -> int:
    """Return half of the memory of this machine, or of the container that this runs in.

    Args:
        cgroup_limit: The file that says what the container may have, if there is one.
    """
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        machine = UNKNOWN_MEMORY
    try:
        allowed = cgroup_limit.read_text().strip()
    except OSError:
        allowed = "max"
    return (min(machine, int(allowed)) if allowed.isdigit() else machine) // SHARE
