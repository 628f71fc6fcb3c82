"""Candidates whose probabilities are in memory, for tests of the search and of its scores."""

from pathlib import Path

import numpy as np

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.predictions.candidates import Candidate, Candidates
from ensemble_kit.predictions.challenge_csv import Pairs
from ensemble_kit.predictions.file import Predictions
from ensemble_kit.predictions.rows import DenseRows, ListedRows

MISSING = -np.inf


def candidates_of(rows, positives, sizes=None, names=None):
    """Return candidates whose probabilities are in memory; those with missing ones list pairs.

    ``names`` are the names and precisions of those that are no candidates of their own.
    """
    num_videos, num_classes = len(positives), len(rows[0][0])
    ids = tuple(f"video{index}" for index in range(num_videos))
    found = []
    for index, scores in enumerate(np.array(rows, np.float32)):
        source = DenseRows(scores)
        if np.isneginf(scores).any():
            offsets = np.concatenate([[0], np.cumsum((scores > MISSING).sum(axis=1))])
            classes = np.nonzero(scores > MISSING)[1]
            source = ListedRows(Pairs(offsets, classes, scores[scores > MISSING]))
        name, dtype = (names or {}).get(index, (f"candidate{index}", None))
        path = Path(name)
        predictions = Predictions(path, path.name, ids, num_classes, source)
        num_bytes = sizes[index] if sizes else 0
        found.append(Candidate(predictions, dtype, num_bytes, np.arange(num_videos)))
    labels = LabelLists.from_lists(map(sorted, positives))
    return Candidates(tuple(found), ids, labels, np.arange(num_classes), "", None)


def write_text(path, *lines):
    """Write lines, and return the path."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
