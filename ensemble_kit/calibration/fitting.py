"""Fits of calibrated probabilities: temperature, Platt's and isotonic, shrunk where data are few.

With x the logit of a probability, the calibrated logit is

- temperature: ``x / T``, one T for all classes (Guo et al., arXiv:1706.04599, section 4.2);
- platt: ``a x + b`` of each class (Platt 1999, section 2.2), by maximum likelihood with a penalty
  of ``PRIOR / 2 ((a - a_0)^2 + (b - b_0)^2)``, where ``a_0`` and ``b_0`` are fitted on all classes
  together: a class with few positives stays near what all classes say;
- isotonic: of each class the rising step function with the least squared error at the knots
  (Zadrozny and Elkan, KDD 2002; pool adjacent violators), where each knot has ``PSEUDO`` more
  observations, which say what all classes together have there.

Every fit returns a curve: the calibrated logits at some knots, linear in between.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ensemble_kit.calibration.counts import CENTRES, Counts
from ensemble_kit.serving.calibration import Floats, interpolated, logit, sigmoid

KNOTS: Floats = np.linspace(-8.0, 8.0, 33)
ENDS: Floats = KNOTS[[0, -1]]  # which are enough for a straight line
PRIOR = 10.0
PSEUDO = 4.0
STEPS = 50  # of Newton's method, which takes about ten


class Curve(NamedTuple):
    """Calibrated logits of C classes.

    Attributes:
        knots: ``(K,)``.
        values: ``(C, K)``, or ``(1, K)`` where all classes have the same.
    """

    knots: Floats
    values: Floats

    @property
    def at_bins(self) -> Floats:
        """The calibrated probability of each bin, ``(C, NUM_BINS)`` or ``(1, NUM_BINS)``."""
        columns = np.tile(CENTRES, (len(self.values), 1)).T
        return sigmoid(interpolated(columns, self.knots, self.values)).T


def temperature(counts: Counts) -> Curve:
    """Fit one temperature for all classes."""
    pooled = _pooled(counts)
    scale = 1.0
    for _ in range(STEPS):
        given = sigmoid(scale * CENTRES)
        slope = ((pooled.pairs * given - pooled.positives) * CENTRES).sum()
        curvature = (pooled.pairs * given * (1 - given) * CENTRES**2).sum()
        scale = max(scale - float(slope / max(curvature, 1e-12)), 0.05)
    return Curve(ENDS, scale * ENDS[None])


def platt(counts: Counts) -> Curve:
    """Fit a scale and a bias of each class."""
    common = _newton(_pooled(counts), np.array([[1.0, 0.0]]), penalty=1.0)
    fitted = _newton(counts, common, penalty=PRIOR)
    return Curve(ENDS, fitted[:, :1] * ENDS + fitted[:, 1:])


def _newton(counts: Counts, centre: Floats, *, penalty: float) -> Floats:
    """Return scale and bias of each row of counts, ``(rows, 2)``, with a penalty from a centre."""
    found = np.repeat(centre, len(counts.pairs), axis=0)
    for _ in range(STEPS):
        given = sigmoid(found[:, :1] * CENTRES + found[:, 1:])
        errors = counts.pairs * given - counts.positives
        weights = counts.pairs * given * (1 - given)
        slope = np.stack([errors @ CENTRES, errors.sum(axis=1)], axis=1)
        slope += penalty * (found - centre)
        aa, ab, bb = (
            weights @ CENTRES**2 + penalty,
            weights @ CENTRES,
            weights.sum(axis=1) + penalty,
        )
        area = aa * bb - ab**2
        step = np.stack(
            [bb * slope[:, 0] - ab * slope[:, 1], aa * slope[:, 1] - ab * slope[:, 0]], axis=1
        )
        found = found - np.clip(step / area[:, None], -1, 1)
        found[:, 0] = np.maximum(found[:, 0], 0.05)  # a higher probability stays higher
    return found


def isotonic(counts: Counts) -> Curve:
    """Fit a rising step function of each class."""
    places = np.rint((CENTRES - KNOTS[0]) / (KNOTS[1] - KNOTS[0])).clip(0, KNOTS.size - 1)
    is_at = places[:, None] == np.arange(KNOTS.size)
    pairs, positives = counts.pairs @ is_at, counts.positives @ is_at
    # One observation at each knot says that the probability is right as it is.
    common = _rising(positives.sum(axis=0) + sigmoid(KNOTS), pairs.sum(axis=0) + 1.0)
    rows = [
        _rising(hits + PSEUDO * common, seen + PSEUDO)
        for hits, seen in zip(positives, pairs, strict=True)
    ]
    return Curve(KNOTS, logit(np.stack(rows)))


def _rising(hits: Floats, pairs: Floats) -> Floats:
    """Return the rising step function nearest to ``hits / pairs`` in squares weighted by pairs."""
    blocks: list[tuple[float, float, int]] = []  # hits, pairs, knots
    for hit, pair in zip(hits.tolist(), pairs.tolist(), strict=True):
        blocks.append((hit, pair, 1))
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    return np.repeat([hit / pair for hit, pair, _ in blocks], [size for *_, size in blocks])


def none(_: Counts) -> Curve:
    """Leave probabilities as they are."""
    return Curve(ENDS, ENDS[None])


def _pooled(counts: Counts) -> Counts:
    return Counts(
        counts.pairs.sum(axis=0, keepdims=True), counts.positives.sum(axis=0, keepdims=True)
    )


METHODS: Mapping[str, Callable[[Counts], Curve]] = MappingProxyType(
    {"none": none, "temperature": temperature, "platt": platt, "isotonic": isotonic}
)
