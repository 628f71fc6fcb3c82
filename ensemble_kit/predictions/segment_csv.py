"""Submissions of the YouTube-8M challenge of 2019: ``Class,Segments``, a line for each class.

The segments of a class are separated by spaces, the likeliest first: ``3,a1b2:0 c3d4:55``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ensemble_kit.choices import SEGMENTS_PER_CLASS
from ensemble_kit.csv_lines import class_index, id_lines
from ensemble_kit.data.segments import segment_name
from ensemble_kit.errors import PredictionsError, shown
from ensemble_kit.files import written_aside
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.texts import read_text

HEADER = "Class,Segments"
MAX_CLASS = 1_000_000
FORBIDDEN = frozenset(',"')
WRITE = "Write it with `ensemble-kit predict MODEL DATA --segments -o FILE`."


class TopSegments:
    """Keeps the segments of the highest probability of each class, in the order of segments.

    In memory are twice K probabilities of each class, and where each segment lies.

    Args:
        num_classes: C.
        k: How many segments of each class to keep; of equal ones, those that came first.
    """

    def __init__(self, num_classes: int, *, k: int = SEGMENTS_PER_CLASS) -> None:
        self.k = k
        self._videos: list[str] = []
        self._starts: list[int] = []
        self._scores = np.empty((0, num_classes), np.float32)
        self._places = np.empty((0, num_classes), np.int64)
        self._waiting: list[Floats] = []

    def add(self, video: str, start: int, row: Floats) -> None:
        """Add a segment.

        Args:
            video: Its video's id.
            start: Where it starts, in seconds.
            row: ``(C,)``, its probabilities.

        Raises:
            PredictionsError: The id would be taken for several, or for none.
        """
        if not video or not FORBIDDEN.isdisjoint(video) or video.split() != [video]:
            raise PredictionsError(
                f"Video id {shown(video)} cannot stand in a submission of segments.",
                hint="Give every record an id without spaces, commas and quotation marks.",
            )
        self._videos.append(video)
        self._starts.append(start)
        self._waiting.append(row)
        if len(self._waiting) >= self.k:
            self._merge()

    def best(self, index: int) -> list[str]:
        """Return the names of the segments of a class, the likeliest first."""
        if self._waiting:
            self._merge()
        return [
            segment_name(self._videos[place], self._starts[place])
            for place in self._places[:, index].tolist()
        ]

    def _merge(self) -> None:
        first = len(self._videos) - len(self._waiting)
        new = np.arange(first, len(self._videos))[:, None]
        scores = np.concatenate([self._scores, np.stack(self._waiting)])
        places = np.concatenate([self._places, np.broadcast_to(new, (len(new), scores.shape[1]))])
        self._waiting.clear()
        order = np.argsort(-scores, axis=0, kind="stable")[: self.k]
        self._scores = np.take_along_axis(scores, order, axis=0)
        self._places = np.take_along_axis(places, order, axis=0)


def write_submission(
    path: Path, segments: TopSegments, classes: Sequence[int], *, force: bool
) -> None:
    """Write a submission.

    Args:
        path: The ``.csv`` file.
        segments: The best segments of each class.
        classes: The classes to list.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    with (
        written_aside(path, force=force) as aside,
        aside.open("w", encoding="utf-8", newline="") as file,
    ):
        file.write(f"{HEADER}\n")
        for index in classes:
            file.write(f"{index},{' '.join(segments.best(index))}\n")


def is_submission(path: Path) -> bool:
    """Return whether a file begins as a submission of segments does."""
    try:
        with path.open("rb") as file:
            return file.read(len(HEADER) + 2).rstrip(b"\r\n").startswith(HEADER.encode())
    except OSError:
        return False


def read_submission(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each class of a submission with its segments, the first of them the likeliest.

    Raises:
        PredictionsError: The file cannot be read, a line names no class or one again, or a segment
            is twice in a line.
    """
    for where, text, rest in id_lines(
        path, [HEADER], error_type=PredictionsError, nouns=("class", "classes")
    ):
        index = class_index(text, MAX_CLASS)
        if index is None:
            raise PredictionsError(f"{where}: {shown(text)} is no class.", hint=WRITE)
        segments = rest.split()
        if len(set(segments)) < len(segments):
            twice = next(each for each in segments if segments.count(each) > 1)
            raise PredictionsError(
                f"{where}: segment {shown(twice)} stands there twice.", hint=WRITE
            )
        yield index, segments


def read_classes(path: Path, num_classes: int) -> list[int]:
    """Return the classes that a file lists, one on each line; a first line may be a heading.

    Raises:
        PredictionsError: The file cannot be read, or a line is no class, or one again.
    """
    lines = read_text(path, PredictionsError, hint="Name a file of classes, one a line.").split()
    if lines and class_index(lines[0], MAX_CLASS) is None:
        del lines[0]
    classes = [class_index(line, num_classes) for line in lines]
    for line, index in zip(lines, classes, strict=True):
        if index is None or classes.count(index) > 1:
            problem = f"is none of the {num_classes} classes" if index is None else "comes twice"
            raise PredictionsError(
                f"{path}: {shown(line)} {problem}.", hint="List each class of a submission once."
            )
    return [index for index in classes if index is not None]
