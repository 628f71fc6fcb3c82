"""The challenge's CSV files: predictions as pairs of class and confidence, and labels.

Source: google/youtube-8m, ``inference.py``: the header ``VideoId,LabelConfidencePairs``, then for
each video its id and its best classes, ``class confidence`` pairs separated by single spaces, the
best first, confidences as ``%g``. WILLOW's files say ``VideoID``, the 2018 instructions say
``Id,Labels``; both are read too.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError

PREDICTIONS_HEADER = "VideoId,LabelConfidencePairs"
PREDICTIONS_HEADERS = (PREDICTIONS_HEADER, "VideoID,LabelConfidencePairs", "Id,Labels")
LABELS_HEADER = "VideoId,Labels"
MAX_CLASSES = 1_000_000  # where no count is known: so that a mistyped class is not a huge matrix


class Pairs(NamedTuple):
    """The classes and confidences that N videos list, one list after the other.

    Attributes:
        offsets: ``(N + 1,)``, int64; video i has the pairs ``offsets[i]`` to ``offsets[i + 1]``.
        classes: int64, in the file's order.
        confidences: float32, in ``[0, 1]``.
    """

    offsets: NDArray[np.int64]
    classes: NDArray[np.int64]
    confidences: NDArray[np.float32]


def read_pairs(path: Path, *, num_classes: int | None) -> tuple[tuple[str, ...], Pairs]:
    """Read the ids and pairs of a predictions file.

    Args:
        path: A file with one of ``PREDICTIONS_HEADERS``.
        num_classes: C; None takes any class under a million.

    Raises:
        PredictionsError: The file cannot be read, or a line of it is not what it should be.
    """
    ids, offsets, classes, confidences = [], array("q", [0]), array("q"), array("f")
    for where, video, text in _lines(path, PREDICTIONS_HEADERS):
        tokens = text.split()
        if len(tokens) % 2:
            raise PredictionsError(
                f"{where}: {len(tokens)} numbers for video {video!r}, expected pairs.",
                hint="Write `class confidence` pairs, separated by single spaces.",
            )
        _add_classes(classes, tokens[::2], where, num_classes)
        confidences.extend([_confidence(token, where) for token in tokens[1::2]])
        ids.append(video)
        offsets.append(len(classes))
    pairs = Pairs(_int64(offsets), _int64(classes), np.frombuffer(confidences, np.float32))
    return tuple(ids), pairs


def read_labels_csv(
    path: Path, *, num_classes: int | None = None
) -> tuple[tuple[str, ...], LabelLists]:
    """Read ids and labels: the header ``VideoId,Labels``, labels separated by spaces, or none.

    Args:
        path: The file.
        num_classes: C; None takes any class under a million.

    Raises:
        PredictionsError: The file cannot be read, or a line of it is not what it should be.
    """
    ids, lists = [], []
    for where, video, text in _lines(path, (LABELS_HEADER,)):
        classes = array("q")
        _add_classes(classes, text.split(), where, num_classes)
        ids.append(video)
        lists.append(classes)
    return tuple(ids), LabelLists.from_lists(lists)


def format_line(
    video: str, classes: NDArray[np.int64], confidences: NDArray[np.floating[Any]]
) -> str:
    """Return one video's line of a predictions file, without its end."""
    pairs = zip(classes.tolist(), confidences.tolist(), strict=True)
    return f"{video}," + " ".join(f"{index} {confidence:g}" for index, confidence in pairs)


def _lines(path: Path, headers: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the id and the rest of each line, after checking header and ids."""
    line_of: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline().rstrip("\n")
            if header not in headers:
                found = f"the first line is {header[:80]!r}" if header else "there is no header"
                raise PredictionsError(
                    f"{path}: {found}, expected {headers[0]!r}.",
                    hint=f"Name a file in the challenge's format, with the header {headers[0]}.",
                )
            for number, line in enumerate(file, start=2):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                video, comma, text = line.rstrip("\n").partition(",")
                if not comma:
                    raise PredictionsError(
                        f"{where}: there is no comma in {video[:80]!r}.",
                        hint=f"Write one line for each video: {headers[0]}.",
                    )
                if line_of.setdefault(video, number) != number:
                    raise PredictionsError(
                        f"{where}: video {video!r} is on line {line_of[video]} already.",
                        hint="Keep one line for each video.",
                    )
                yield where, video, text
    except OSError as error:
        raise PredictionsError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error
    except UnicodeDecodeError as error:
        raise PredictionsError(
            f"{path} is not text in UTF-8.", hint="Name a CSV file, or save it as UTF-8."
        ) from error
    if not line_of:
        raise PredictionsError(
            f"{path} holds no videos.", hint="Write one line for each video under the header."
        )


def _add_classes(
    classes: "array[int]", tokens: list[str], where: str, num_classes: int | None
) -> None:
    limit = num_classes or MAX_CLASSES
    start = len(classes)
    for token in tokens:
        if not token.isdecimal() or int(token) >= limit:
            raise PredictionsError(
                f"{where}: {token!r} is not a class, expected a number from 0 to {limit - 1}.",
                hint="Number the classes from 0, as the records' labels do.",
            )
        classes.append(int(token))
    if len(set(classes[start:])) < len(tokens):
        twice = next(c for c in classes[start:] if classes[start:].count(c) > 1)
        raise PredictionsError(
            f"{where}: class {twice} is listed twice.",
            hint="List each class of a video once.",
        )


def _confidence(token: str, where: str) -> float:
    try:
        confidence = float(token)
    except ValueError:
        confidence = np.nan
    if not 0 <= confidence <= 1:  # so is NaN
        raise PredictionsError(
            f"{where}: {token!r} is not a confidence, expected a number from 0 to 1.",
            hint="Write probabilities, not logits or percentages.",
        )
    return confidence


def _int64(values: "array[int]") -> NDArray[np.int64]:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)
