"""What the classes that a predictions file left out could change, by bounds.

A file that keeps some classes of each video says that none of the others exceeds a bound. GAP does
not fall when the score of a positive rises, nor when the score of another class falls. So it is
highest where each probability that was left out is its bound for a positive and 0 for every other
class, and lowest the other way about. Both are computed, with ties decided for the hits in the one
and against them in the other.

Why bounds and not samples: values drawn for what was left out would say how far the GAP usually
moves, but not that the same members would be chosen.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import average_precision
from ensemble_kit.selection.scoring import Scorer, Term, summed
from ensemble_kit.selection.search import ROUNDING, Ensemble, Rules
from ensemble_kit.selection.table import Block, Table
from ensemble_kit.store.selection_file import Interval

MOST_COMPARED = 1000  # ensembles, each of which takes two rankings


class _Pairs(NamedTuple):
    """A mixture's pairs of some videos, ``(n, W)``: the least and the most they can score."""

    least: NDArray[np.float64]
    most: NDArray[np.float64]
    is_hit: NDArray[np.bool_]


class _Ranked(NamedTuple):
    """The k best scores of videos so far; of equal scores, hits come first, or last."""

    scores: list[NDArray[np.float64]]
    hits: list[NDArray[np.bool_]]
    hits_first: bool

    def add(self, scores: NDArray[np.float64], is_hit: NDArray[np.bool_], k: int) -> None:
        """Rank the rows of some more videos, ``(n, W)``."""
        order = np.lexsort((is_hit != self.hits_first, -scores), axis=1)[:, :k]
        self.scores.append(np.take_along_axis(scores, order, axis=1).reshape(-1))
        self.hits.append(np.take_along_axis(is_hit, order, axis=1).reshape(-1))

    def gap(self, num_positives: int) -> float:
        """Return the GAP of all videos."""
        scores, hits = np.concatenate(self.scores), np.concatenate(self.hits)
        is_ranked = scores > -np.inf
        scores, hits = scores[is_ranked], hits[is_ranked]
        order = np.lexsort((hits != self.hits_first, -scores))
        if not num_positives:
            return 0.0
        return average_precision(np.flatnonzero(hits[order]) + 1, num_positives)


def truncated(table: Table) -> list[int]:
    """Return the places of the candidates that do not keep every class."""
    return np.flatnonzero(~table.lists_all).tolist()


def gap_bounds(scorer: Scorer, terms: Sequence[Term]) -> Interval:
    """Return the bounds of a mixture's GAP, whatever the left-out probabilities are."""
    lowest, highest = _Ranked([], [], hits_first=False), _Ranked([], [], hits_first=True)
    for block in scorer.table.blocks:
        pairs = _pairs(scorer, block.taken({term.candidate for term in terms}), terms)
        lowest.add(np.where(pairs.is_hit, pairs.least, pairs.most), pairs.is_hit, scorer.k)
        highest.add(np.where(pairs.is_hit, pairs.most, pairs.least), pairs.is_hit, scorer.k)
    num_positives = scorer.table.num_positives
    return lowest.gap(num_positives), highest.gap(num_positives)


def is_decided(
    scorer: Scorer, rules: Rules, chosen: Ensemble, measured: Sequence[Ensemble]
) -> bool | None:
    """Return whether the same members would be chosen, whatever was left out.

    Each choice must be better at its worst than every other one at its best, and where a search
    adds members as long as that raises the GAP, than the ensemble that it adds to at its best.

    Args:
        scorer: What measured the ensembles.
        rules: The rules of the search.
        chosen: The ensemble that was chosen.
        measured: All ensembles that were measured.

    Returns:
        True where they were given; None for a beam search, where other ensembles might have led
        elsewhere, for a choice by gain per byte, and where the bounds of too many ensembles would
        have to be compared.
    """
    if rules.strategy == "given":
        return True
    is_unknown = rules.strategy == "beam" or rules.criterion == "gain-per-byte"
    if is_unknown or len(measured) > MOST_COMPARED:
        return None
    path = {ensemble.key for ensemble in chosen.additions}
    steps = chosen.additions[len(rules.start) :]
    if rules.strategy == "exhaustive":
        steps = (chosen,)
    for step in steps:
        lowest, _ = gap_bounds(scorer, step.terms)
        before = None if rules.strategy == "exhaustive" else step.parent
        if before and before.terms and gap_bounds(scorer, before.terms)[1] >= lowest - ROUNDING:
            return False
        for other in measured:
            is_rival = rules.strategy == "exhaustive" or len(other.terms) == len(step.terms)
            if is_rival and other.key != step.key and gap_bounds(scorer, other.terms)[1] >= lowest:
                return False
    lowest, _ = gap_bounds(scorer, chosen.terms)
    return all(
        gap_bounds(scorer, other.terms)[1] <= lowest
        for other in measured
        if len(other.terms) > len(chosen.terms) and other.key not in path
    )


def _pairs(scorer: Scorer, block: Block, terms: Sequence[Term]) -> _Pairs:
    """Return a block's pairs, and k more for each video: the classes outside of the table."""
    table, k = scorer.table, scorer.k
    counts = np.diff(block.offsets)
    videos = slice(block.start, block.start + block.num_videos)
    sums = summed(block, terms)[:-1]
    slack, outside = np.zeros(len(sums)), np.zeros(block.num_videos)
    is_listed = np.zeros(len(sums), np.bool_)
    for index, weight in terms:
        bounds = table.bounds[index, videos]
        if table.lists_all[index] or block.is_listed is None:
            is_listed[:] = True
        else:
            left_out = table.left_out_bounds(index)[videos]
            listed = block.is_listed[index][:-1]
            is_listed |= listed
            slack += np.where(listed, 0, weight * np.repeat(left_out, counts))
            bounds = np.maximum(bounds, left_out)
        outside += weight * bounds
    least = np.where(is_listed, sums, -np.inf)
    rows = np.repeat(np.arange(block.num_videos), counts)
    columns = np.arange(len(sums)) - np.repeat(block.offsets[:-1], counts)
    shape = block.num_videos, int(counts.max(initial=0)) + k
    pairs = _Pairs(np.full(shape, -np.inf), np.full(shape, -np.inf), np.zeros(shape, np.bool_))
    pairs.least[rows, columns] = least
    pairs.most[rows, columns] = sums + slack
    pairs.is_hit[rows, columns] = block.is_hit[:-1]
    pairs.most[:, -k:] = np.where(table.is_whole[videos] & ~table.has_gaps, -np.inf, outside)[
        :, None
    ]
    return pairs
