"""How far GAPs would move with other videos: resamples of the videos with replacement.

Source: Efron, "Bootstrap methods: another look at the jackknife", 1979; intervals are percentiles.
A resample counts each video as often as it was drawn. Its pairs keep their order, and a pair that
counts w times stands w times in one place: a hit adds ``w * (hits so far) / (pairs so far)``, both
including itself. So each pool is ranked once, and a resample is one pass over the ranking instead
of a new table.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import CONFIDENCE
from ensemble_kit.progress import progress
from ensemble_kit.selection.ranking import ONE, Keys
from ensemble_kit.selection.table import NUM_THREADS
from ensemble_kit.store.selection_file import Interval


class _Ranking(NamedTuple):
    """The pairs of a pool, best first: their videos, and the places of the hits."""

    videos: NDArray[np.int32]
    hits: NDArray[np.int64]

    def gap(self, counts: NDArray[np.int32], num_positives: int) -> float:
        """Return the GAP with each video counted as often as ``counts`` says."""
        if not num_positives:
            return 0.0
        drawn = counts[self.videos]
        pairs = np.cumsum(drawn, dtype=np.int32)[self.hits]
        hits = drawn[self.hits]
        hits_so_far = np.cumsum(hits, dtype=np.int64)
        return float((hits * hits_so_far / np.maximum(pairs, 1)).sum()) / num_positives


def resampled_gaps(
    pools: Iterable[Keys], positives: NDArray[np.int64], *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the GAPs of some pools on the same resamples, ``(pools, resamples)``.

    Args:
        pools: Pools of the same N videos, see ``ranking.pooled_gap``; each is ranked as it comes.
        positives: ``(N,)``, the number of labels of each video.
        resamples: How often videos are drawn.
        seed: The seed of the draws.
    """
    rankings = [_ranking(pool) for pool in pools]

    def resample(index: int) -> list[float]:
        counts = _drawn(len(positives), index, seed)
        num_positives = int(counts @ positives)
        return [ranking.gap(counts, num_positives) for ranking in rankings]

    with ThreadPoolExecutor(NUM_THREADS) as threads, progress("resample", resamples) as shown:
        rows = []
        for row in threads.map(resample, range(resamples)):
            rows.append(row)
            shown.update(len(rows), "resamples")
    return np.array(rows).reshape(resamples, len(rankings)).T


def centred(drawn: NDArray[np.float64], scores: Sequence[float]) -> NDArray[np.float64]:
    """Return scores on resamples, ``(n, resamples)``, shifted so that their mean is the score.

    A mean over classes of average precision is higher on resamples than on the videos themselves,
    by far more than it varies: a rare class has a positive or two, and one that is drawn twice
    stands twice before what ranks below it. GAP has one ranking with the positives of all classes,
    where that is little.
    What is left of a resample is how far it lies from the others (Efron and Tibshirani, "An
    introduction to the bootstrap", 1993, chapter 10, on bias).
    """
    if not drawn.size:
        return drawn
    shifts = np.array(scores) - drawn.mean(axis=1)
    shifted: NDArray[np.float64] = drawn + shifts[:, None]
    return shifted


def drawn_counts(num_videos: int, *, resamples: int, seed: int) -> NDArray[np.integer[Any]]:
    """Return how often each video was drawn, ``(N, resamples)``, in as few bytes as that takes.

    The draws are those of ``resampled_gaps``.
    """
    counts = np.zeros((num_videos, resamples), np.uint8)
    for index in range(resamples):
        drawn = _drawn(num_videos, index, seed)
        counts = counts.astype(
            np.promote_types(counts.dtype, np.min_scalar_type(drawn.max())), copy=False
        )
        counts[:, index] = drawn
    return counts


def _drawn(num_videos: int, index: int, seed: int) -> NDArray[np.int32]:
    """Return how often each video was drawn in one resample, ``(N,)``."""
    drawn = np.random.default_rng([seed, index]).integers(num_videos, size=num_videos)
    return np.bincount(drawn, minlength=num_videos).astype(np.int32)


def interval(values: NDArray[np.float64]) -> Interval:
    """Return the two values between which the middle 95 % of some values lie."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _ranking(pool: Keys) -> _Ranking:
    """Rank all pairs: by score, then by video, then in the row's order, which is ascending."""
    flat = pool[:, ::-1].reshape(-1)
    order = np.argsort(~(flat >> ONE), kind="stable")[: np.count_nonzero(flat)]
    hits = np.flatnonzero(flat[order] & ONE)
    order = order[: hits[-1] + 1 if hits.size else 0]
    return _Ranking((order // pool.shape[1]).astype(np.int32), hits)
