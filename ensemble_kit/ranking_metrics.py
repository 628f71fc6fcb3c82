"""mAP, AUC and d' over whole rankings, and lwlrap, as AudioSet's papers report them. NumPy only.

``metrics`` has the challenge's metrics, for which the best 20 classes of each video are enough.
These rank all videos of a class, or all classes of a video, so every probability counts.

**Ties** are those of scikit-learn, whose functions the papers call: equal scores share the worst of
their places, so no metric depends on the order of videos or classes.

Memory: the scores are looked at twice, and only those of the positives are kept in between, so what
is held does not grow with the number of classes that a video does not have.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists

Floats: TypeAlias = NDArray[np.floating[Any]]
Blocks: TypeAlias = Callable[[], Iterable[tuple[Floats, LabelLists]]]


@dataclass(frozen=True, kw_only=True)
class RankingMetrics:
    """What whole rankings say, as fractions but for ``d_prime``.

    Attributes:
        macro_map: The mean over the classes with a positive of average precision, as
            ``sklearn.metrics.average_precision_score`` computes it; AudioSet's mAP.
        auc: The mean, over the classes that some videos have and some do not, of the area under
            the receiver operating characteristic: how often a video with the class has a higher
            score than one without, ties counting half.
        d_prime: ``sqrt(2)`` times the normal quantile of ``auc`` (Hershey et al., "CNN
            architectures for large-scale audio classification", arXiv:1609.09430); None where
            ``auc`` is 0 or 1.
        lwlrap: Label-weighted label-ranking average precision, of task 2 of DCASE 2019 (Fonseca et
            al., arXiv:1906.02975): the mean over all labels of all videos of the
            precision among the classes that the video ranks as high as the label.
    """

    macro_map: float
    auc: float
    d_prime: float | None
    lwlrap: float

    def as_dict(self) -> dict[str, float | None]:
        """Return the fields by name, unrounded."""
        return asdict(self)


def measure_rankings(blocks: Blocks, num_classes: int) -> RankingMetrics:
    """Return the metrics of whole rankings; a mean of nothing is 0.

    Args:
        blocks: Yields all videos' scores ``(n, C)``, finite, and their labels, some videos at a
            time; called twice.
        num_classes: C.
    """
    positives, num_videos, lwlrap = _positives(blocks, num_classes)
    at_least, equal = _ranks(blocks, positives, num_videos)
    precisions, areas = [], []
    for scores, ranks, ties in zip(positives, at_least, equal, strict=True):
        if not scores.size:
            continue
        hits = _hits_at_least(scores)
        precisions.append(shared_average_precision(scores, ranks))
        num_negatives = num_videos - scores.size
        if num_negatives:
            equal_hits = np.searchsorted(scores, scores, side="right") - (scores.size - hits)
            above = ranks - hits - (ties - equal_hits) / 2  # negatives, those of equal score half
            areas.append(1 - above.mean() / num_negatives)
    auc = _mean(areas)
    return RankingMetrics(
        macro_map=_mean(precisions), auc=auc, d_prime=_d_prime(auc), lwlrap=lwlrap
    )


def shared_average_precision(positives: Floats, at_least: NDArray[np.int64]) -> float:
    """Return a class's average precision, where equal scores share the worst of their places.

    Args:
        positives: ``(P,)``, the scores of the videos that have the class, ascending; P is not 0.
        at_least: ``(P,)``, how many videos score at least that.
    """
    return float((_hits_at_least(positives) / at_least).mean())


def _hits_at_least(positives: Floats) -> NDArray[np.int64]:
    """Return how many positives score at least what each does, of ascending scores."""
    return positives.size - np.searchsorted(positives, positives, side="left")


def _positives(blocks: Blocks, num_classes: int) -> tuple[list[Floats], int, float]:
    """Return each class's scores of its positives, ascending; the number of videos; and lwlrap."""
    scores, classes, precisions, num_videos = [], [], [], 0
    for rows, labels in blocks():
        num_videos += len(rows)
        videos = np.repeat(np.arange(len(rows)), np.diff(labels.offsets))
        scores.append(rows[videos, labels.classes])
        classes.append(labels.classes)
        precisions.append(_label_precisions(rows, labels))
    if not num_videos:
        return [np.empty(0) for _ in range(num_classes)], 0, 0.0
    joined, owners = np.concatenate(scores), np.concatenate(classes)
    order = np.lexsort((joined, owners))
    ends = np.cumsum(np.bincount(owners, minlength=num_classes))
    return np.split(joined[order], ends[:-1]), num_videos, _mean(np.concatenate(precisions))


def _label_precisions(rows: Floats, labels: LabelLists) -> NDArray[np.float64]:
    """Return, of each label of some videos, the precision down to its place in the video."""
    found = []
    for row, start, stop in zip(rows, labels.offsets[:-1], labels.offsets[1:], strict=True):
        own = row[labels.classes[start:stop]]
        places = np.count_nonzero(row >= own[:, None], axis=1)
        found.append(np.count_nonzero(own >= own[:, None], axis=1) / places)
    return np.concatenate([np.empty(0), *found])


def _ranks(
    blocks: Blocks, positives: list[Floats], num_videos: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Return, for each score of a positive, how many videos score at least that, and equally."""
    not_above = [np.zeros(scores.size + 1, np.int64) for scores in positives]
    equal = [np.zeros(scores.size + 1, np.int64) for scores in positives]
    for rows, _ in blocks():
        for index, (scores, column) in enumerate(
            zip(positives, np.ascontiguousarray(rows.T), strict=True)
        ):
            if scores.size:
                places = np.searchsorted(scores, column, side="right")  # how many are not above it
                not_above[index] += np.bincount(places, minlength=scores.size + 1)
                ties = places[(places > 0) & (scores[places - 1] == column)]
                equal[index] += np.bincount(ties, minlength=scores.size + 1)
    at_least = [num_videos - np.cumsum(counts)[:-1] for counts in not_above]
    # The last of equal scores has the ties of all of them.
    last = [np.searchsorted(scores, scores, side="right") for scores in positives]
    return at_least, [counts[places] for counts, places in zip(equal, last, strict=True)]


def _d_prime(auc: float) -> float | None:
    return sqrt(2) * NormalDist().inv_cdf(auc) if 0 < auc < 1 else None


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
