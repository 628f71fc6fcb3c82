"""Candidates whose probabilities are in memory, for tests of the search and of its scores."""

from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from reference import gap_loops, mixed_loops

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.predictions.candidates import Candidate, Candidates
from ensemble_kit.predictions.challenge_csv import Pairs
from ensemble_kit.predictions.file import Predictions
from ensemble_kit.predictions.rows import DenseRows, ListedRows
from ensemble_kit.selection.scoring import Scorer
from ensemble_kit.selection.search import Rules, Search
from ensemble_kit.selection.table import read_tables

MISSING = -np.inf


def candidates_of(rows, positives, sizes=None, names=None):
    """Return candidates whose probabilities are in memory; those with missing ones list pairs.

    ``names`` are the names and precisions of those that are not candidates themselves.
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


K = 2


class SearchCase:
    """Some candidates, and the GAP of any of their ensembles by the loops."""

    def __init__(self, rows, positives, sizes, limit):
        self.rows, self.positives, self.sizes, self.limit = rows, positives, sizes, limit
        self.known = candidates_of(rows, positives, sizes)
        self.gaps = {}

    def gap(self, members):
        key = tuple(sorted(members))
        if key not in self.gaps:
            mixed = mixed_loops([self.rows[index] for index in key], [1] * len(key))
            self.gaps[key] = gap_loops(mixed, self.positives, K)
        return self.gaps[key]

    def num_bytes(self, members):
        return sum(self.sizes[index] for index in set(members))

    def order(self, members):
        """What decides: the GAP, then bytes, then names, which are in order of place."""
        return -self.gap(members), self.num_bytes(members), members

    def fits(self, members):
        return self.num_bytes(members) <= self.limit

    def search(self, strategy, **changes):
        rules = {
            "strategy": strategy,
            "criterion": "gain",
            "limit": self.limit,
            "max_members": None,
            "beam_width": 1,
            "start": (),
        }
        (table,) = read_tables(self.known, [np.ones(len(self.positives), bool)], k=K)
        weights = [1.0] * len(self.rows)
        return Search(Scorer(table, K), self.known.candidates, weights, Rules(**rules | changes))


@st.composite
def search_cases(draw):
    """Eighths as scores, so that sums are exact; one candidate fits at least."""
    num_videos, num_classes = draw(st.integers(2, 4)), draw(st.integers(3, 5))
    score = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.875])
    row = st.lists(score, min_size=num_classes, max_size=num_classes)
    one = st.lists(row, min_size=num_videos, max_size=num_videos)
    rows = draw(st.lists(one, min_size=2, max_size=4))
    classes = st.sets(st.integers(0, num_classes - 1), min_size=1, max_size=2)
    positives = draw(st.lists(classes, min_size=num_videos, max_size=num_videos))
    sizes = draw(st.lists(st.sampled_from([2, 3, 5]), min_size=len(rows), max_size=len(rows)))
    return SearchCase(rows, positives, sizes, draw(st.integers(5, 13)))


# Of the two classes the first video's is the first and the second's the second. Alone and in their
# mean one of them is taken for the other; not where the first candidate counts twice.
FIRST_COUNTS_MORE = [[[0.4, 0.1], [0.4, 0.3]], [[0.1, 0.5], [0.1, 0.5]]]
