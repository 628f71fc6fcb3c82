"""Rankings of the videos of each class, on resamples of the videos.

A resample counts each video as often as it was drawn. Its pairs keep their order, and a pair that
counts w times stands w times in one place, as in ``bootstrap``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import mean_over_classes
from ensemble_kit.progress import progress
from ensemble_kit.selection.bootstrap import centred, drawn_counts


class ClassRanking(NamedTuple):
    """Pairs of video and class by class, then best first: their videos, and what ranks the hits.

    Attributes:
        videos: ``(P,)``.
        hits: The places of the hits.
        classes: The class of each hit.
        starts: Where the pairs of each hit's class begin.
        first_hits: Which hit is the first of each hit's class.
    """

    videos: NDArray[np.int64]
    hits: NDArray[np.int64]
    classes: NDArray[np.integer[Any]]
    starts: NDArray[np.int64]
    first_hits: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        scores: NDArray[np.float64],
        classes: NDArray[np.integer[Any]],
        is_hit: NDArray[np.bool_],
        videos: NDArray[np.int64],
    ) -> "ClassRanking":
        """Rank ``(P,)`` pairs; equal scores keep the order given."""
        order = np.lexsort((-scores, classes))  # stable
        hits = np.flatnonzero(is_hit[order])
        of_hits = classes[order][hits]
        return cls(
            videos[order],
            hits,
            of_hits,
            np.searchsorted(classes[order], of_hits),
            np.searchsorted(of_hits, of_hits),
        )

    def score(self, drawn: NDArray[np.int64], positives: NDArray[np.int64]) -> float:
        """Return the mean average precision with each video counted as often as it was drawn.

        Args:
            drawn: How often each video was drawn, ``(N,)``.
            positives: How many drawn videos have each class, ``(C,)``.
        """
        counts = drawn[self.videos]
        pairs = np.cumsum(counts)
        own = counts[self.hits]
        found = np.cumsum(own)
        pairs_so_far = pairs[self.hits] - (pairs - counts)[self.starts]
        hits_so_far = found - (found - own)[self.first_hits]
        terms = own * hits_so_far / np.maximum(pairs_so_far, 1)
        sums = np.bincount(self.classes, weights=terms, minlength=len(positives))
        return mean_over_classes(sums / np.maximum(positives, 1), positives)


def resampled_means(
    rankings: Sequence[ClassRanking],
    scores: Sequence[float],
    labels: tuple[NDArray[np.int64], NDArray[np.integer[Any]]],
    num_videos: int,
    num_classes: int,
    *,
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """Return the mean average precision of some rankings on the same resamples.

    Args:
        rankings: The rankings of N videos.
        scores: The mean average precision of each, which the resamples are centred on.
        labels: The video and the class of each label.
        num_videos: N.
        num_classes: C.
        resamples: How often videos are drawn.
        seed: The seed of the draws.

    Returns:
        ``(rankings, resamples)``.
    """
    videos, classes = labels
    counts = drawn_counts(num_videos, resamples=resamples, seed=seed).T
    found = np.empty((len(rankings), resamples))
    with progress("resample", resamples) as shown:
        for index, drawn in enumerate(counts.astype(np.int64)):
            positives = np.bincount(classes, weights=drawn[videos], minlength=num_classes)
            whole = positives.astype(np.int64)
            found[:, index] = [ranking.score(drawn, whole) for ranking in rankings]
            shown.update(index + 1, "resamples")
    return centred(found, scores)
