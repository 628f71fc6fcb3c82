"""Folds of records by a hash of their ids, for out-of-fold predictions.

A record's fold depends on its id and the number of folds alone, whatever file it lies in and
whatever else is there.
"""

import hashlib
import re
from dataclasses import dataclass

from ensemble_kit.errors import RecordError, shown

FOLD = r"[1-9][0-9]{0,3}/[1-9][0-9]{0,3}"


@dataclass(frozen=True)
class Fold:
    """One of several folds.

    Attributes:
        number: Which of them, counted from 1.
        of: How many there are, at least 2.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Fold":
        """Read a fold as it is written: ``2/5``.

        Raises:
            RecordError: There is no such fold.
        """
        number, of = map(int, text.split("/")) if re.fullmatch(FOLD, text) else (0, 0)
        if not 1 <= number <= of or of < 2:
            raise RecordError(
                f"{shown(text)} is no fold: its number, /, and how many folds there are, at "
                "least 2.",
                hint="Write --fold 1/5 for the first of five folds, up to --fold 5/5.",
            )
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, video: str) -> bool:
        """Return whether a video is in the fold.

        The first eight bytes of the SHA-256 of its id, as a number, leave ``number - 1`` when they
        are divided by ``of``. What ``select`` holds out and ``data convert`` splits off depends on
        how large that number is, so folds are cut across those parts.
        """
        digest = hashlib.sha256(video.encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1


@dataclass(frozen=True)
class Part:
    """The records in a fold, or all others.

    Attributes:
        fold: The fold.
        is_in: Whether the part is the fold itself.
    """

    fold: Fold
    is_in: bool

    def __str__(self) -> str:
        return f"fold {self.fold}" if self.is_in else f"all but fold {self.fold}"

    def has(self, video: str) -> bool:
        """Return whether a video is in the part."""
        return self.fold.holds(video) == self.is_in
