"""Thresholds of each class, for a wished precision and for the best F1.

Above a threshold t, ``n`` pairs of video and class have a probability of at least t, ``h`` of them
are positives, and the calibrated probabilities say that ``m`` of them should be. The precision is
taken as ``(h + S m / n) / (n + S)``: what was counted, and ``S`` observations more that say what
the calibrated probabilities do. So a class that was never predicted above t, or has few videos,
has the precision that its calibrated probability promises, not 0 / 0 or 1 / 1.
"""

import numpy as np

from ensemble_kit.calibration.counts import CENTRES, WIDTH, Counts
from ensemble_kit.serving.calibration import NEVER, Floats, sigmoid

LEVELS = np.array([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99])
SHRINKAGE = 20.0  # S
EDGES = np.append(0.0, sigmoid(CENTRES[1:] - WIDTH / 2))  # the least probability of each bin


def precision_thresholds(counts: Counts, calibrated: Floats) -> Floats:
    """Return, for each class and level, the least threshold from which on it has the precision.

    Args:
        counts: Of the videos.
        calibrated: ``(C, NUM_BINS)`` or ``(1, NUM_BINS)``: the probability that each bin is given.

    Returns:
        ``(C, L)``; ``NEVER`` where no threshold has the precision.
    """
    precisions = _precisions(counts, calibrated)
    reached = precisions[:, :, None] >= LEVELS
    lowest = np.argmax(reached, axis=1)
    return np.where(reached.any(axis=1), EDGES[lowest], NEVER)


def best_f1_thresholds(counts: Counts, calibrated: Floats) -> Floats:
    """Return the threshold of each class with the best F1, ``(C,)``.

    F1 is ``2 h / (n + g)`` with g positives of the class. To a class's own h, n and g come those of
    ``S`` positives of all classes together, at the same calibrated probability. By its own counts
    alone, a rare class that is told badly would have its best F1 where every video gets it (Lipton
    et al., arXiv:1402.1892, section 4).
    """
    given = np.broadcast_to(calibrated, counts.pairs.shape)
    order = np.argsort(-given, axis=None, kind="stable")
    ends = np.searchsorted(-given.reshape(-1)[order], -given, side="right") - 1
    total = max(float(counts.positives.sum()), 1.0)
    common = [
        np.cumsum(array.reshape(-1)[order])[ends] / total
        for array in (counts.positives, counts.pairs)
    ]
    hits = _above(counts.positives) + SHRINKAGE * common[0]
    tags = _above(counts.pairs) + SHRINKAGE * common[1]
    f1 = 2 * hits / (tags + counts.num_positives[:, None] + SHRINKAGE)
    best: Floats = EDGES[np.argmax(f1, axis=1)]
    return best


def tagged(counts: Counts, thresholds: Floats) -> tuple[int, int]:
    """Return how many tags some videos get, and how many of them are labels.

    Args:
        counts: Of the videos.
        thresholds: ``(C,)``, lower ends of bins, or ``NEVER``.
    """
    is_tag = thresholds[:, None] <= EDGES
    return int(counts.pairs[is_tag].sum()), int(counts.positives[is_tag].sum())


def _precisions(counts: Counts, calibrated: Floats) -> Floats:
    """Return the shrunk precision of each class from each bin upwards, ``(C, NUM_BINS)``."""
    given = np.broadcast_to(calibrated, counts.pairs.shape)
    pairs, hits = _above(counts.pairs), _above(counts.positives)
    promised = np.where(pairs > 0, _above(counts.pairs * given) / np.maximum(pairs, 1), given)
    result: Floats = (hits + SHRINKAGE * promised) / (pairs + SHRINKAGE)
    return result


def _above(counts: Floats) -> Floats:
    """Return sums from each bin upwards."""
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
