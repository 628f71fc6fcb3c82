"""One numbering of columns for the rows of several files, and for their labels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.predictions.challenge_csv import Pairs
from ensemble_kit.predictions.file import Predictions
from ensemble_kit.predictions.rows import ListedRows


class Columns(NamedTuple):
    """Files whose rows have the same columns.

    Attributes:
        opened: The files.
        labels: Their labels, as columns.
        classes: ``(C,)``, int64, ascending: the class of each column.
    """

    opened: tuple[Predictions, ...]
    labels: LabelLists
    classes: NDArray[np.int64]


def common_columns(opened: Sequence[Predictions], labels: LabelLists) -> Columns:
    """Return files whose rows have a column for each class of the vocabulary.

    Where none of them says how many classes there are, columns are the classes that a file or a
    label names, and no others: one class 999999 would make every row a million long. No metric
    counts a class that is neither listed nor a label, and ties rank by class as before.

    Args:
        opened: One file or more; those that say how many classes there are agree.
        labels: Labels of any number of videos, each of a class that those files have.
    """
    known = next((each.num_classes for each in opened if each.knows_classes), None)
    if known is not None:
        wide = tuple(replace(each, num_classes=known) for each in opened)
        return Columns(wide, labels, np.arange(known))
    listed = [each.source.pairs.classes for each in opened if isinstance(each.source, ListedRows)]
    classes = np.unique(np.concatenate([*listed, labels.classes]))
    if not classes.size:
        classes = np.zeros(1, np.int64)  # rows without a column could not be ranked
    compact = tuple(_compact(each, classes) for each in opened)
    return Columns(compact, _renumbered(labels, classes), classes)


def _compact(predictions: Predictions, classes: NDArray[np.int64]) -> Predictions:
    assert isinstance(predictions.source, ListedRows)
    offsets, listed, confidences = predictions.source.pairs
    pairs = Pairs(offsets, np.searchsorted(classes, listed), confidences)
    return replace(predictions, num_classes=len(classes), source=ListedRows(pairs))


def _renumbered(labels: LabelLists, classes: NDArray[np.int64]) -> LabelLists:
    return LabelLists(labels.offsets, np.searchsorted(classes, labels.classes))
