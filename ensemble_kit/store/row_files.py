"""Matrices in files, read some rows at a time.

Rows are read and not mapped: the pages of a mapped file count as the process's memory until the
system wants them back, and a selection would seem to need as much as all its candidates together.
"""

from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.errors import PredictionsError


@dataclass(frozen=True)
class RowFile:
    """A matrix of N rows of C numbers that lies in a file, one row after the other.

    Attributes:
        path: The file.
        offset: Where in it the matrix begins, in bytes.
        dtype: NumPy's name of the numbers' type.
        shape: ``(N, C)``.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, int]

    def read(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Return some rows, ``(n, C)``, in the order asked for; neighbours are read together.

        Raises:
            PredictionsError: The file has gone, or is shorter than it was.
        """
        rows = np.empty((len(places), self.shape[1]), self.dtype)
        starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        stops = np.append(starts[1:], len(places))
        try:
            with self.path.open("rb", buffering=0) as file:
                for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                    file.seek(self.offset + int(places[start]) * rows.strides[0])
                    self._fill(rows[start:stop], file)
        except OSError as error:
            raise PredictionsError(
                f"{self.path} cannot be read: {error.strerror}.", hint="Name a file that exists."
            ) from error
        return rows

    def _fill(self, rows: NDArray[Any], file: FileIO) -> None:
        left = rows.reshape(-1).view(np.uint8).data
        while left:
            count = file.readinto(left)  # a system reads 2 GiB at once at most
            if not count:
                raise PredictionsError(
                    f"{self.path} ends before its last row.",
                    hint="Make the file again; it was cut short.",
                )
            left = left[count:]
