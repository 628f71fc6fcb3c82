"""Scores and hits as integers that sort alike, and the GAP of a pool of them.

A key is the bits of a score, which of two floats that are not negative order as the floats do,
with one more bit that says whether the pair is a hit: one sort of plain integers brings both.
"""

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import average_precision

Keys = NDArray[np.uint64]
ABSENT = 0  # the key of a pair that is not ranked: below that of a score of 0
MISS = 2  # what is added to twice a score's bits, so that the key of a score of 0 is not 0
HIT = 3
BINADE = 53  # a key's bits above these are the score's exponent
MANTISSA_BITS = 14  # of a score's place in the histogram: 16384 places between s and 2 s
PLACE = BINADE - MANTISSA_BITS  # a key's bits above these are its place
BINADES = 24  # scores under 2^-24 of the best share one place
ONE = np.uint64(1)


def key_flags(is_hit: NDArray[np.bool_]) -> Keys:
    """Return what ``keys_of`` adds for each pair."""
    return np.where(is_hit, np.uint64(HIT), np.uint64(MISS))


def to_keys(scores: NDArray[np.float64], flags: Keys) -> Keys:
    """Turn scores, in place, into keys.

    Args:
        scores: Not negative; -0.0 is.
        flags: From ``key_flags``; ``ABSENT`` where the score is 0 and no pair is.
    """
    keys = scores.view(np.uint64)
    np.left_shift(keys, ONE, out=keys)
    keys += flags
    return keys


def to_scores(keys: Keys) -> NDArray[np.float64]:
    """Return the scores of keys; ``-inf`` for ``ABSENT``."""
    scores = ((keys >> ONE) - ONE).view(np.float64)
    return np.where(keys == ABSENT, -np.inf, scores)


def unsettled_rows(keys: Keys) -> NDArray[np.int64]:
    """Return the rows whose k best pairs, or their order, depend on the classes' order.

    Args:
        keys: ``(n, k + 1)``, the best of each row, ascending.
    """
    steps = keys[:, 1:] ^ keys[:, :-1]
    is_unsettled = (steps[:, 0] == 0) & (keys[:, 1] & ONE).astype(np.bool_)  # a hit is cut off
    is_tied = steps == ONE  # from a miss to a hit of the same score
    if is_tied.any():  # seldom, and much faster to ask than row by row
        is_unsettled |= is_tied.any(axis=1)
    return np.flatnonzero(is_unsettled)


def pooled_gap(pool: Keys, num_positives: int) -> float:
    """Return the GAP of the pairs of N videos.

    The number is that of ``metrics.pooled_average_precision``, bit for bit: equal scores rank by
    video, then in the row's order. All pairs are counted in a histogram, and only those that share
    a place of it with a hit are sorted.

    Args:
        pool: ``(N, k)``, ascending in each row; of equal scores the last ranks first.
        num_positives: The denominator. With 0 the answer is 0.
    """
    flat = pool.reshape(-1)
    if not flat.size or not num_positives:
        return 0.0
    lowest = max(int(flat.max()) - (BINADES << BINADE), int(flat.min()))
    lowest = lowest >> PLACE << PLACE  # so that a hit and a miss of one score share a place
    places = _places(flat, lowest)
    counts = np.bincount(places)
    has_hits = np.zeros(len(counts), np.bool_)
    has_hits[places[(flat & ONE).astype(np.bool_)]] = True
    mixed = np.flatnonzero(np.take(has_hits, places))
    keys = np.sort(flat[mixed])[::-1]
    _settle_ties(keys, mixed, pool, lowest)
    hits = np.flatnonzero(keys & ONE)
    above = np.cumsum(np.where(has_hits, 0, counts)[::-1])[::-1]
    ranks = hits + 1 + above[_places(keys[hits], lowest)]
    return average_precision(ranks, num_positives)


def _places(keys: Keys, lowest: int) -> NDArray[np.int64]:
    """Return the place of each key in a histogram that begins at the key ``lowest``."""
    above = np.maximum(keys, np.uint64(lowest)) - np.uint64(lowest)
    return (above >> np.uint64(PLACE)).view(np.int64)


def _settle_ties(keys: Keys, mixed: NDArray[np.int64], pool: Keys, lowest: int) -> None:
    """Put hits and misses of the same score into the order of the pool.

    Args:
        keys: The keys of ``mixed``, descending, so that of equal scores the hits are first.
        mixed: Which pairs of the pool, row by row, they are of.
        pool: See ``pooled_gap``; so for ``lowest``.
        lowest: Where the histogram begins.
    """
    scores = keys >> ONE
    tied = np.unique(scores[:-1][(keys[:-1] ^ keys[1:]) == ONE])
    if not tied.size:
        return
    changes = np.zeros(len(keys) + 1, np.int64)
    changes[np.searchsorted(scores[::-1], tied, side="left")] += 1
    changes[np.searchsorted(scores[::-1], tied, side="right")] -= 1
    targets = np.flatnonzero(np.cumsum(changes[:-1])[::-1])
    flat = pool.reshape(-1)
    places = _places(flat[mixed], lowest)
    near = np.zeros(int(places.max()) + 1, np.bool_)
    near[_places(keys[targets], lowest)] = True
    sources = mixed[near[places]]
    sources = sources[np.isin(flat[sources] >> ONE, tied)]
    videos, columns = np.divmod(sources, pool.shape[1])
    keys[targets] = flat[sources[np.lexsort((-columns, videos, ~(flat[sources] >> ONE)))]]
