"""What the classes that a predictions file left out could change, by bounds.

A file that keeps some classes of each video says that none of the others exceeds a bound. GAP does
not fall when the score of a positive rises, nor when the score of another class falls. So it is
highest where each probability that was left out is its bound for a positive and 0 for every other
class, and lowest the other way about. Both are computed, with ties decided for the hits in the one
and against them in the other.

Why bounds and not samples: values drawn for what was left out would say how far the GAP usually
moves, but not that the same members would be chosen.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import average_precision
from ensemble_kit.selection.scoring import Scorer, Term, summed
from ensemble_kit.selection.search import Ensemble, Rules
from ensemble_kit.selection.table import Block, Table
from ensemble_kit.store.selection_file import Interval

MOST_COMPARED = 1000  # ensembles, each of which takes two rankings


class _Pairs(NamedTuple):
    """A mixture's pairs of some videos, ``(n, W)``: the least and the most they can score."""

    least: NDArray[np.float64]
    most: NDArray[np.float64]
    is_hit: NDArray[np.bool_]


def truncated(table: Table) -> list[int]:
    """Return the places of the candidates that do not keep every class."""
    return np.flatnonzero(~table.lists_all).tolist()


def gap_bounds(scorer: Scorer, terms: Sequence[Term]) -> Interval:
    """Return the bounds of a mixture's GAP, whatever the left-out probabilities are."""
    pairs = [_pairs(scorer, block, terms) for block in scorer.table.blocks]
    lowest = _gap(scorer, ((np.where(p.is_hit, p.least, p.most), p.is_hit) for p in pairs), False)
    highest = _gap(scorer, ((np.where(p.is_hit, p.most, p.least), p.is_hit) for p in pairs), True)
    return lowest, highest


def is_decided(
    scorer: Scorer, rules: Rules, chosen: Ensemble, measured: Sequence[Ensemble]
) -> bool | None:
    """Return whether the same members would be chosen, whatever was left out.

    Each choice must be better at its worst than every other one at its best.

    Args:
        scorer: What measured the ensembles.
        rules: The rules of the search.
        chosen: The ensemble that was chosen.
        measured: All ensembles that were measured.

    Returns:
        True where they were given; None for a beam search, where other ensembles might have led
        elsewhere, and where the bounds of too many ensembles would have to be compared.
    """
    if rules.strategy == "given":
        return True
    if rules.strategy == "beam" or len(measured) > MOST_COMPARED:
        return None
    path = {ensemble.key for ensemble in chosen.additions}
    steps = chosen.additions[len(rules.start) :]
    if rules.strategy == "exhaustive":
        steps = (chosen,)
    for step in steps:
        lowest, _ = gap_bounds(scorer, step.terms)
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
            listed = block.is_listed[index, :-1]
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
    pairs.most[:, -k:] = np.where(table.is_whole[videos], -np.inf, outside)[:, None]
    return pairs


def _gap(
    scorer: Scorer,
    rows: Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]],
    hits_first: bool,
) -> float:
    """Return the GAP of rows of scores; of equal scores, hits come first, or last."""
    pooled, hits = [], []
    for scores, is_hit in rows:
        order = np.lexsort((is_hit != hits_first, -scores), axis=1)[:, : scorer.k]
        pooled.append(np.take_along_axis(scores, order, axis=1).reshape(-1))
        hits.append(np.take_along_axis(is_hit, order, axis=1).reshape(-1))
    all_scores, all_hits = np.concatenate(pooled), np.concatenate(hits)
    is_ranked = all_scores > -np.inf
    all_scores, all_hits = all_scores[is_ranked], all_hits[is_ranked]
    order = np.lexsort((all_hits != hits_first, -all_scores))
    if not scorer.table.num_positives:
        return 0.0
    return average_precision(np.flatnonzero(all_hits[order]) + 1, scorer.table.num_positives)
