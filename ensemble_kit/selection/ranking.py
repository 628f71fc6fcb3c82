"""Scores and hits as integers that sort alike, and the GAP of a pool of them.

A key is twice the bits of a score plus a bit that says whether the pair is a hit. The bits of two
floats that are not negative order as the floats do (IEEE 754 was laid out so that they would), so
one sort of plain integers orders the scores and brings the hits along. An ``argsort`` of the floats
and a second pass to gather the hits takes three times as long, and a stable one fifteen times.

**The tie rule** is that of ``metrics``: equal scores rank by video, then by class, lowest first. A
key knows neither, so among equal scores its order is hits first, which flatters. It is put right
afterwards, and only where a hit and a miss have the same score, which is seldom: within a video by
``unsettled_rows``, over all videos by ``_settle_ties``. To put video and class into the key would
need 128 bits.

**The pool is not sorted.** GAP needs the rank of each hit, which is the number of pairs above it.
All pairs are counted in a histogram whose places are as fine as the first 14 bits of a score's
mantissa. Where a place holds hits alone, their ranks follow each other in whatever order; only the
pairs of places that hold both a hit and a miss are sorted, which are about one in seven.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import average_precision

Keys = NDArray[np.uint64]
ABSENT = 0  # the key of a pair that is not ranked: below that of a score of 0
MISS = 2  # added to twice a score's bits, so that the key of a score of 0 is not ABSENT
HIT = 3
BINADE = 53  # a key's bits above these are the score's exponent
MANTISSA_BITS = 14  # of a score's place in the histogram: 16384 places between s and 2 s
PLACE = BINADE - MANTISSA_BITS  # a key's bits above these are its place
BINADES = 24  # scores under 2^-24 times the best share one place
ONE = np.uint64(1)


def key_flags(is_hit: NDArray[np.bool_]) -> Keys:
    """Return what ``to_keys`` adds for each pair."""
    return np.where(is_hit, np.uint64(HIT), np.uint64(MISS))


def to_keys(scores: NDArray[np.float64], flags: Keys) -> Keys:
    """Turn scores, in place, into keys.

    Args:
        scores: At least 0; -0.0 is not allowed, for its sign is a bit.
        flags: From ``key_flags``; ``ABSENT``, with a score of 0, where there is no pair.
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
    """Return the rows whose k best pairs, or whose order, depend on the order of classes.

    Args:
        keys: ``(n, k + 1)``, the best keys of each row, ascending.
    """
    steps = keys[:, 1:] ^ keys[:, :-1]
    is_unsettled = (steps[:, 0] == 0) & (keys[:, 1] & ONE).astype(np.bool_)  # a hit is cut off
    is_tied = steps == ONE  # from a miss to a hit of the same score
    if is_tied.any():  # seldom true, and much faster to ask than row by row
        is_unsettled |= is_tied.any(axis=1)
    return np.flatnonzero(is_unsettled)


def pooled_gap(pool: Keys, num_positives: int) -> float:
    """Return the GAP of the pairs of N videos.

    It is the number that ``metrics.pooled_average_precision`` returns, bit for bit: equal scores
    rank by video, then in the row's order.

    Args:
        pool: ``(N, k)``, ascending in each row; of equal scores the last ranks first.
        num_positives: The denominator. If it is 0, so is the GAP.
    """
    return pooled_gaps([pool], num_positives)[0]


def pooled_gaps(pools: Sequence[Keys] | Keys, num_positives: int) -> list[float]:
    """Return the GAP of each pool, see ``pooled_gap``; all are of one shape.

    One after the other, in the same memory: a page that is new to a process has to be cleared
    first, which takes longer than what is done in it here.
    """
    if not len(pools) or not pools[0].size or not num_positives:
        return [0.0] * len(pools)
    memory = np.empty(pools[0].size, np.int64)
    return [average_precision(_ranks_of_hits(pool, memory), num_positives) for pool in pools]


def _ranks_of_hits(pool: Keys, memory: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ranks of a pool's hits, ascending.

    Args:
        pool: See ``pooled_gap``.
        memory: ``(N * k,)``, which is overwritten.
    """
    flat = pool.reshape(-1)
    lowest = max(int(flat.max()) - (BINADES << BINADE), int(flat.min()))
    lowest = lowest >> PLACE << PLACE  # so that a hit and a miss of one score share a place
    places = _places(flat, lowest, memory)
    counts = np.bincount(places)
    num_hits = np.bincount(places[_are_hits(flat)], minlength=len(counts))
    above = np.cumsum(counts[::-1])[::-1] - counts

    # As if hits ranked first in each place, the places with hits from the best one down.
    with_hits = np.flatnonzero(num_hits)[::-1]
    hits, pairs, pairs_above = num_hits[with_hits], counts[with_hits], above[with_hits]
    ends = np.cumsum(hits)
    ranks = np.arange(1, hits.sum() + 1)
    ranks += np.repeat(pairs_above - (ends - hits), hits)

    # Where a place holds misses too, the pairs are sorted: all of them together, and then a hit's
    # rank among them less those of better places is its rank in its own place.
    is_mixed = hits < pairs
    is_place_mixed = np.zeros(len(counts), np.bool_)
    is_place_mixed[with_hits[is_mixed]] = True
    mixed = np.flatnonzero(is_place_mixed[places])
    keys = np.sort(flat[mixed])[::-1]
    _settle_ties(keys, mixed, pool, lowest)
    mixed_above = np.cumsum(pairs[is_mixed]) - pairs[is_mixed]
    others_above = np.repeat(pairs_above[is_mixed] - mixed_above, hits[is_mixed])
    ranks[np.repeat(is_mixed, hits)] = np.flatnonzero(_are_hits(keys)) + 1 + others_above
    return ranks


def _places(keys: Keys, lowest: int, memory: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return each key's place in a histogram that begins at the key ``lowest``, in some memory."""
    out = None if memory is None else memory.view(np.uint64)
    above = np.maximum(keys, np.uint64(lowest), out=out)
    above -= np.uint64(lowest)
    above >>= np.uint64(PLACE)
    return above.view(np.int64)


def _are_hits(keys: Keys) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.empty(keys.shape, np.bool_)
    return np.bitwise_and(keys, ONE, out=found, casting="unsafe")  # no numbers in between


def _settle_ties(keys: Keys, mixed: NDArray[np.int64], pool: Keys, lowest: int) -> None:
    """Put hits and misses of the same score into the order of the pool.

    Args:
        keys: The keys of ``mixed``, descending, so that of equal scores the hits are first.
        mixed: The places of these pairs in the pool, row by row.
        pool: See ``pooled_gap``.
        lowest: The key where the histogram begins.
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
