"""How often each class is a label of a video, by the logit of its probability.

All that calibration and thresholds need of N videos and C classes: two counts for each class and
each bin of a sixteenth in logit, which is 0.016 in probability at 0.5 and a sixteenth of the odds'
size anywhere. So memory does not grow with the videos, and every fit takes the same time.

Why not the probabilities themselves: 20,000 videos of 3,862 classes are 300 MB, sorted again by
each of several fits, for thresholds that are sharper than any of those videos can tell.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.serving.calibration import Floats, logit

WIDTH = 1 / 16  # of a bin
LOWEST, HIGHEST = -12.0, 12.0  # what lies beyond is in the first or last bin
NUM_BINS = round((HIGHEST - LOWEST) / WIDTH)
CENTRES: Floats = np.linspace(LOWEST + WIDTH / 2, HIGHEST - WIDTH / 2, NUM_BINS)


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts of C classes by bin.

    Attributes:
        pairs: ``(C, NUM_BINS)``, float64: videos whose probability of the class lies in the bin.
        positives: ``(C, NUM_BINS)``, float64: those of them that have the class.
    """

    pairs: Floats
    positives: Floats

    @classmethod
    def empty(cls, num_classes: int) -> "Counts":
        """Return the counts of no videos."""
        shape = (num_classes, NUM_BINS)
        return cls(np.zeros(shape), np.zeros(shape))

    def add(self, probabilities: NDArray[np.floating[Any]], labels: LabelLists) -> None:
        """Count some videos.

        Args:
            probabilities: ``(n, C)``, in [0, 1].
            labels: Of the same n videos.
        """
        places = ((logit(probabilities) - LOWEST) / WIDTH).astype(np.int64)
        places = np.clip(places, 0, NUM_BINS - 1) + NUM_BINS * np.arange(len(self.pairs))
        self.pairs.reshape(-1)[:] += np.bincount(places.reshape(-1), minlength=self.pairs.size)
        videos = np.repeat(np.arange(len(places)), np.diff(labels.offsets))
        own = places[videos, labels.classes]
        self.positives.reshape(-1)[:] += np.bincount(own, minlength=self.pairs.size)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.pairs + other.pairs, self.positives + other.positives)

    @property
    def num_positives(self) -> Floats:
        """How many videos have each class, ``(C,)``."""
        total: Floats = self.positives.sum(axis=1)
        return total


def mean_log_loss(counts: Counts, calibrated: Floats) -> float:
    """Return the mean cross-entropy of all pairs of video and class, in nats.

    Args:
        counts: Of the videos.
        calibrated: ``(C, NUM_BINS)`` or ``(1, NUM_BINS)``: the probability that each bin is given.
    """
    negatives = counts.pairs - counts.positives
    total = -(counts.positives * np.log(calibrated) + negatives * np.log1p(-calibrated)).sum()
    return float(total / max(counts.pairs.sum(), 1))


def expected_calibration_error(counts: Counts, calibrated: Floats, num_bins: int = 15) -> float:
    """Return the expected calibration error over all pairs (Guo et al., arXiv:1706.04599, eq. 3).

    Pairs are dealt by their probability into bins of equal width; the error is the mean, by pairs,
    of the distance between a bin's mean probability and its share of positives.
    """
    _, gaps, weights = reliability(counts, calibrated, num_bins)
    return float((np.abs(gaps) * weights).sum() / max(weights.sum(), 1))


def reliability(
    counts: Counts, calibrated: Floats, num_bins: int = 15
) -> tuple[Floats, Floats, Floats]:
    """Return each bin's mean probability, its share of positives less that, and its pairs."""
    given = np.broadcast_to(calibrated, counts.pairs.shape)
    places = np.minimum((given * num_bins).astype(np.int64), num_bins - 1).reshape(-1)
    pairs = np.bincount(places, counts.pairs.reshape(-1), num_bins).astype(np.float64)
    sums = np.bincount(places, (counts.pairs * given).reshape(-1), num_bins)
    hits = np.bincount(places, counts.positives.reshape(-1), num_bins)
    means = sums / np.maximum(pairs, 1)
    return means, hits / np.maximum(pairs, 1) - means, pairs
