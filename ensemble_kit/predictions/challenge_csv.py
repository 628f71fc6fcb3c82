"""The challenge's CSV files: predictions as pairs of class and confidence, and labels.

Source: google/youtube-8m, ``inference.py``: the header ``VideoId,LabelConfidencePairs``, then for
each video its id and its best classes as ``class confidence`` pairs separated by single spaces, the
best first, confidences as ``%g``. WILLOW's files say ``VideoID``, the 2018 instructions say
``Id,Labels``; both are read too. An id that holds a comma or a quotation mark stands in quotation
marks, as RFC 4180 says. Either file may be gzipped.

Confidences are kept as float64: that is what their text says, and tools that write more than the
challenge's six digits write scores which float32 would make equal.
"""

from array import array
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import MAX_CLASSES
from ensemble_kit.csv_lines import LABELS_HEADER, class_index, id_lines
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError, shown

PREDICTIONS_HEADER = "VideoId,LabelConfidencePairs"
PREDICTIONS_HEADERS = (PREDICTIONS_HEADER, "VideoID,LabelConfidencePairs", "Id,Labels")


class Pairs(NamedTuple):
    """The classes and confidences that N videos list, one list after the other.

    Attributes:
        offsets: ``(N + 1,)``, int64; video i has the pairs ``offsets[i]`` to ``offsets[i + 1]``.
        classes: int64, in the file's order.
        confidences: float64, in ``[0, 1]``.
    """

    offsets: NDArray[np.int64]
    classes: NDArray[np.int64]
    confidences: NDArray[np.float64]


def read_pairs(path: Path, *, num_classes: int | None) -> tuple[tuple[str, ...], Pairs]:
    """Read the ids and pairs of a predictions file.

    Args:
        path: A file with one of ``PREDICTIONS_HEADERS``.
        num_classes: C; None takes any class under a million.

    Raises:
        PredictionsError: The file cannot be read, or one of its lines is not what it should be.
    """
    ids, offsets, classes, confidences = [], array("q", [0]), array("q"), array("d")
    for where, video, text in id_lines(path, PREDICTIONS_HEADERS, error_type=PredictionsError):
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
    return tuple(ids), Pairs(_int64(offsets), _int64(classes), np.array(confidences, np.float64))


def read_labels_csv(
    path: Path, *, num_classes: int | None = None
) -> tuple[tuple[str, ...], LabelLists]:
    """Read ids and labels: the header ``VideoId,Labels``, labels separated by spaces, or none.

    Args:
        path: The file.
        num_classes: C; None takes any class under a million.

    Raises:
        PredictionsError: The file cannot be read, or one of its lines is not what it should be.
    """
    ids, lists = [], []
    for where, video, text in id_lines(path, (LABELS_HEADER,), error_type=PredictionsError):
        classes = array("q")
        _add_classes(classes, text.split(), where, num_classes)
        ids.append(video)
        lists.append(classes)
    return tuple(ids), LabelLists.from_lists(lists)


def format_line(
    video: str, classes: NDArray[np.int64], confidences: NDArray[np.floating[Any]]
) -> str:
    """Return one video's line of a predictions file, without the line end.

    A confidence of ``-inf`` stands for a class that is not listed.
    """
    if "," in video or '"' in video:
        video = '"' + video.replace('"', '""') + '"'
    return f"{video},{format_pairs(classes, confidences)}"


def format_pairs(classes: NDArray[np.int64], confidences: NDArray[np.floating[Any]]) -> str:
    """Return classes and confidences in turn, without those of ``-inf``.

    What models compute, float32, has the challenge's six digits. float64 comes from other tools'
    files and may differ in later digits alone, so it has as many as are read back as it is.
    """
    spell = _all_digits if confidences.dtype == np.float64 else "{:g}".format
    pairs = zip(classes.tolist(), confidences.tolist(), strict=True)
    return " ".join(f"{index} {spell(number)}" for index, number in pairs if number > -inf)


def _all_digits(number: float) -> str:
    """Return the shortest text that is read back as the number; as with ``%g``, 1 is ``1``."""
    return repr(number).removesuffix(".0")


def _add_classes(
    classes: "array[int]", tokens: list[str], where: str, num_classes: int | None
) -> None:
    limit = num_classes or MAX_CLASSES
    start = len(classes)
    for token in tokens:
        index = class_index(token, limit)
        if index is None:
            raise PredictionsError(
                f"{where}: {shown(token)} is not a class, expected a number from 0 to {limit - 1}.",
                hint="Number the classes from 0, as the records' labels do.",
            )
        classes.append(index)
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
        confidence = -1.0
    if not isfinite(confidence):
        state = "not a number" if isnan(confidence) else "infinite"
        raise PredictionsError(
            f"{where}: a confidence is {state} ({shown(token)}).",
            hint="Predict again with a model whose weights and features are finite.",
        )
    if not 0 <= confidence <= 1:
        raise PredictionsError(
            f"{where}: {shown(token)} is not a confidence, expected a number from 0 to 1.",
            hint="Write probabilities, not logits or percentages.",
        )
    return confidence


def _int64(values: "array[int]") -> NDArray[np.int64]:
    return np.array(values, np.int64)
