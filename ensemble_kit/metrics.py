"""GAP@k, Hit@1, PERR and mAP, as the YouTube-8M challenge computes them. NumPy only.

Source: google/youtube-8m, ``average_precision_calculator.py`` and ``eval_util.py``. Ours differs
in one point: there, the order of tied scores depends on the batches; here one rule holds
everywhere, so that a number never depends on how the videos were batched.

**Ties.** Equal scores rank by video order, then by class index, lowest first. The rule decides the
pooled order of GAP and mAP, which classes make a video's top k, the argmax of Hit@1 and the top
scores of PERR.

**No prediction.** A score of ``-inf`` says that a class was not predicted at all, as in a file that
lists only some classes of each video. It is never pooled and never a hit.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import TOP_K
from ensemble_kit.data.labels import LabelLists

Floats: TypeAlias = NDArray[np.floating[Any]]
Labels: TypeAlias = NDArray[Any] | LabelLists
BLOCK_VALUES = 2**20  # scores ranked together: 4 to 8 MiB, which a core's caches can hold


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The four metrics of some predictions, as fractions, and what they were measured on.

    Attributes:
        k: How many classes of each video count in GAP and mAP.
        gap: Global average precision at k.
        hit_at_1: The share of videos whose best class is a positive.
        perr: Precision at equal recall rate.
        map: Mean average precision, over the classes with at least one positive.
        videos: The number of videos.
        positives: The number of positives of all videos over all classes.
        classes_with_positives: The number of classes that ``map`` is a mean of.
    """

    k: int
    gap: float
    hit_at_1: float
    perr: float
    map: float
    videos: int
    positives: int
    classes_with_positives: int

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name, unrounded."""
        return asdict(self)


class MetricsAccumulator:
    """All four metrics of videos that come in batches; they equal those of all videos at once.

    It keeps the k best scores of each video, 9 to 13 bytes each, and no others.

    Args:
        num_classes: C, the number of classes.
        k: How many classes of each video count in GAP and mAP.
        block_values: About how many scores to rank together.

    Raises:
        ValueError: ``num_classes`` or ``k`` is less than 1.
    """

    def __init__(
        self, *, num_classes: int, k: int = TOP_K, block_values: int = BLOCK_VALUES
    ) -> None:
        if num_classes < 1 or k < 1:
            raise ValueError(f"num_classes and k must be at least 1, not {num_classes} and {k}")
        self.num_classes = num_classes
        self.k = k
        self.block_values = block_values
        self._pool: list[tuple[Floats, NDArray[np.bool_], NDArray[np.int32]]] = []
        self._positives = np.zeros(num_classes, np.int64)
        self._precisions: list[Floats] = []  # each video's, as a running sum would round by batch
        self._hits = 0
        self._videos = 0

    def add(self, probabilities: Floats, labels: Labels) -> None:
        """Add some videos.

        Args:
            probabilities: ``(n, C)``, floating point; ``-inf`` where a class is not predicted.
            labels: ``(n, C)``, positive where greater than 0, or the label lists of n videos.

        Raises:
            ValueError: The shapes do not agree, or a score is NaN.
        """
        probabilities = np.asarray(probabilities)
        if not np.issubdtype(probabilities.dtype, np.floating):
            probabilities = probabilities.astype(np.float64)
        if probabilities.ndim != 2 or probabilities.shape[1] != self.num_classes:
            raise ValueError(
                f"probabilities must be (n, {self.num_classes}), not {probabilities.shape}"
            )
        for rows, is_positive in _label_blocks(labels, probabilities.shape, self.block_values):
            self._add_block(probabilities[rows], is_positive)

    def _add_block(self, probabilities: Floats, is_positive: NDArray[np.bool_]) -> None:
        num_positives = np.count_nonzero(is_positive, axis=1)
        depth = max(self.k, int(num_positives.max(initial=0)))
        classes, scores = top_classes(probabilities, depth)
        hits = np.take_along_axis(is_positive, classes, axis=1) & (scores > -np.inf)
        ranks = np.arange(hits.shape[1])
        counted = hits & (scores > 0) & (ranks < num_positives[:, None])
        self._precisions.append(np.count_nonzero(counted, axis=1) / np.maximum(num_positives, 1))
        self._hits += int(np.count_nonzero(hits[:, 0]))
        self._videos += len(hits)
        self._positives += np.count_nonzero(is_positive, axis=0)
        pooled = (scores > -np.inf) & (ranks < self.k)
        self._pool.append((scores[pooled], hits[pooled], classes[pooled].astype(np.int32)))

    def result(self) -> Metrics:
        """Return the metrics of all videos added so far; all are 0 where there is no positive."""
        scores, hits, classes = self._pooled()
        precisions = np.concatenate([np.empty(0), *self._precisions])
        num_positives = int(self._positives.sum())
        return Metrics(
            k=self.k,
            gap=pooled_average_precision(scores, hits, num_positives),
            hit_at_1=self._hits / max(self._videos, 1),
            perr=float(precisions.sum()) / max(self._videos, 1),
            map=mean_over_classes(
                average_precisions(scores, hits, classes, self._positives), self._positives
            ),
            videos=self._videos,
            positives=num_positives,
            classes_with_positives=int(np.count_nonzero(self._positives)),
        )

    def class_average_precisions(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return each class's average precision and its number of positives.

        Returns:
            Average precisions ``(C,)``, 0 for a class without a positive, and positives ``(C,)``.
            ``map`` is the mean over the classes with a positive.
        """
        return average_precisions(*self._pooled(), self._positives), self._positives.copy()

    def _pooled(self) -> tuple[Floats, NDArray[np.bool_], NDArray[np.int32]]:
        if not self._pool:
            return np.empty(0), np.empty(0, np.bool_), np.empty(0, np.int32)
        scores, hits, classes = (np.concatenate(parts) for parts in zip(*self._pool, strict=True))
        return scores, hits, classes


def measure(probabilities: Floats, labels: Labels, *, k: int = TOP_K) -> Metrics:
    """Return all four metrics of ``(N, C)`` scores; see ``MetricsAccumulator.add``."""
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities must be (N, C), not {probabilities.shape}")
    accumulator = MetricsAccumulator(num_classes=probabilities.shape[1], k=k)
    accumulator.add(probabilities, labels)
    return accumulator.result()


def global_average_precision(probabilities: Floats, labels: Labels, *, k: int = TOP_K) -> float:
    """Return GAP@k, a fraction.

    The k best classes of every video are pooled and sorted by score. With ``P(i)`` the share of
    positives among the first i pooled pairs and ``rel(i)`` 1 where pair i is a positive::

        GAP = sum_i P(i) * rel(i) / number of positives of all videos over all classes

    The denominator counts the positives outside every top k too, so a perfect model scores below 1
    where a video has more than k labels. Ties rank by video order, then by class index. With no
    positive at all the GAP is 0.

    Args:
        probabilities: ``(N, C)``, floating point; ``-inf`` where a class is not predicted.
        labels: ``(N, C)``, positive where greater than 0, or the label lists of N videos.
        k: How many classes of each video are pooled.

    Raises:
        ValueError: The shapes do not agree, or a score is NaN.
    """
    return measure(probabilities, labels, k=k).gap


def hit_at_one(probabilities: Floats, labels: Labels) -> float:
    """Return the share of videos whose best class is a positive; of tied classes, the lowest.

    It takes and raises what ``global_average_precision`` does.
    """
    return measure(probabilities, labels, k=1).hit_at_1


def precision_at_equal_recall_rate(probabilities: Floats, labels: Labels) -> float:
    """Return PERR: how many of a video's g best classes are positives, when it has g positives.

    A video's part is the number of positives among its g best classes with a score over 0, divided
    by g; 0 where it has no positive. PERR is the mean over videos. Of tied classes the lowest
    counts first. It takes and raises what ``global_average_precision`` does.
    """
    return measure(probabilities, labels, k=1).perr


def mean_average_precision(probabilities: Floats, labels: Labels, *, k: int = TOP_K) -> float:
    """Return mAP: the mean of the classes' average precisions, over classes with a positive.

    A class's average precision ranks the videos that have it among their k best classes, by score,
    then by video order, and divides by all positives of the class. It takes and raises what
    ``global_average_precision`` does.
    """
    return measure(probabilities, labels, k=k).map


def top_classes(probabilities: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """Return each video's k best classes and their scores, best first, ties by class index.

    This is exact, and several times faster than a partition of every row: the classes are dealt
    into groups, and the k-th best score cannot be below the k-th best group maximum. Comparing all
    scores with that leaves about k of each video to sort.

    Args:
        probabilities: ``(n, C)``, floating point; ``-inf`` where a class is not predicted.
        k: At least 1; C where greater.

    Returns:
        Classes and scores, both ``(n, min(k, C))``. Where fewer classes are predicted, the rest of
        the row has the score ``-inf`` and the class 0.

    Raises:
        ValueError: A score is NaN.
    """
    num_videos, num_classes = probabilities.shape
    k = min(k, num_classes)
    maxima = group_maxima(probabilities, num_groups=max(6 * k, isqrt(num_classes)))
    if np.isnan(maxima).any():
        raise ValueError("a score is NaN")
    bounds = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k]
    bounds = np.maximum(bounds, np.finfo(probabilities.dtype).min)  # so that -inf never passes
    passed = np.flatnonzero(probabilities >= bounds[:, None])
    rows, candidates = np.divmod(passed, num_classes)
    counts = np.bincount(rows, minlength=num_videos)
    places = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    width = max(k, int(counts.max(initial=0)))
    scores = np.full((num_videos, width), -np.inf, probabilities.dtype)
    scores[rows, places] = probabilities.reshape(-1)[passed]
    classes = np.zeros((num_videos, width), np.int64)
    classes[rows, places] = candidates
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(classes, order, axis=1), np.take_along_axis(scores, order, axis=1)


def group_maxima(probabilities: Floats, *, num_groups: int) -> Floats:
    """Deal the classes of ``(n, C)`` scores into G groups; return each group's best, ``(n, G)``.

    G is ``num_groups``, or C if that is less.
    """
    num_videos, num_classes = probabilities.shape
    num_groups = min(num_groups, num_classes)
    dealt = num_classes // num_groups * num_groups
    groups = probabilities[:, :dealt].reshape(num_videos, -1, num_groups)
    maxima: Floats = groups.max(axis=1)
    rest = num_classes - dealt  # under num_groups, so it adds at most one class to a group
    np.maximum(maxima[:, :rest], probabilities[:, dealt:], out=maxima[:, :rest])
    return maxima


def top_hits(
    probabilities: Floats, is_positive: NDArray[np.bool_], k: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the scores that a block of videos adds to the pool of GAP@k, and which are hits.

    Args:
        probabilities: ``(n, C)``, floating point; ``-inf`` where a class is not predicted.
        is_positive: ``(n, C)``, bool.
        k: How many classes of each video are pooled.

    Returns:
        Two flat arrays, at most ``n * k`` long: by video, then best first, ties by class index.
    """
    classes, scores = top_classes(probabilities, k)
    predicted = scores > -np.inf
    hits = np.take_along_axis(is_positive, classes, axis=1)
    return scores[predicted], hits[predicted]


def pooled_average_precision(scores: Floats, hits: NDArray[np.bool_], num_positives: int) -> float:
    """Return the average precision of one pool; of what ``top_hits`` returned, it is the GAP.

    Args:
        scores: ``(P,)``; equal scores rank in the order given.
        hits: ``(P,)``, whether a pair is a positive.
        num_positives: The denominator: all positives, pooled or not. If it is 0, so is the result.
    """
    if num_positives == 0:
        return 0.0
    order = np.argsort(-scores, kind="stable")
    return average_precision(np.flatnonzero(hits[order]) + 1, num_positives)


def average_precision(ranks: NDArray[np.int64], num_positives: int) -> float:
    """Return the sum of the precisions at the hits' ranks, best first, divided by the positives."""
    return float((np.arange(1, ranks.size + 1) / ranks).sum()) / num_positives


def average_precisions(
    scores: Floats,
    hits: NDArray[np.bool_],
    classes: NDArray[np.integer[Any]],
    positives: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return each class's average precision, ``(C,)``; 0 for a class without a positive.

    Args:
        scores: ``(P,)``, of pairs of a video and a class, in the order of the videos, which is also
            the order of equal scores.
        hits: ``(P,)``, whether a pair is a positive.
        classes: ``(P,)``, the class of each pair.
        positives: ``(C,)``, how many videos have each class, pooled or not.
    """
    order = np.lexsort((-scores, classes))  # stable, so ties stay in video order
    sorted_classes = classes[order]
    places = np.flatnonzero(hits[order])
    hit_classes = sorted_classes[places]
    ranks = places - np.searchsorted(sorted_classes, hit_classes) + 1
    counts = np.arange(1, places.size + 1) - np.searchsorted(hit_classes, hit_classes)
    sums = np.bincount(hit_classes, weights=counts / ranks, minlength=len(positives))
    return sums / np.maximum(positives, 1)


def mean_over_classes(precisions: NDArray[np.float64], positives: NDArray[np.int64]) -> float:
    """Return the mean over the classes with a positive; 0 where there is none."""
    return float(precisions[positives > 0].mean()) if positives.any() else 0.0


def _label_blocks(
    labels: Labels, shape: tuple[int, ...], block_values: int
) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
    """Yield slices of videos that fit a core's caches, each with its dense labels."""
    num_videos, num_classes = shape
    if isinstance(labels, LabelLists):
        label_shape: tuple[int, ...] = (labels.num_videos, num_classes)
    else:
        labels = np.asarray(labels)
        label_shape = labels.shape
    if label_shape != shape:
        raise ValueError(f"labels are of shape {label_shape}, probabilities of {shape}")
    step = max(1, block_values // num_classes)
    for start in range(0, num_videos, step):
        stop = min(start + step, num_videos)
        if isinstance(labels, LabelLists):
            yield slice(start, stop), labels.rows(start, stop).dense(num_classes)
        else:
            yield slice(start, stop), labels[start:stop] > 0
