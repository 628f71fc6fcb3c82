"""MAP@K of segments, as the YouTube-8M challenge of 2019 computes it. NumPy only.

Source: google/youtube-8m, ``segment_eval_inference.py``. A submission lists, for each class, the K
segments that are likeliest to show it, the best first. Of each list the segments are left that
people were asked about for that class; the others count neither for nor against. With ``P(i)`` the
share of shown ones among the first i that are left, and ``rel(i)`` 1 where number i is shown::

    AP = sum_i P(i) * rel(i) / number of segments that are known to show the class
    MAP = the mean of AP over the classes

Ours differs in one point: there, the mean is over the classes that the submission lists, which a
submission raises by leaving out what it is bad at; here it is over all classes that some segment is
known to show, and a class that is not listed counts 0. Where a submission lists just these, as the
challenge asked for, the two are the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ensemble_kit.choices import SEGMENTS_PER_CLASS
from ensemble_kit.data.segments import Ratings
from ensemble_kit.metrics import average_precision


@dataclass(frozen=True, kw_only=True)
class SegmentMetrics:
    """What a submission of segments scores.

    Attributes:
        k: How many segments of each class count.
        map_at_k: MAP@K, a fraction.
        classes_with_positives: The number of classes that it is a mean of.
        positives: How many pairs of segment and class are known to be shown.
        rated: How many pairs have a rating.
    """

    k: int
    map_at_k: float
    classes_with_positives: int
    positives: int
    rated: int

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name, unrounded."""
        return asdict(self)


def measure_segments(
    submission: Iterable[tuple[int, Sequence[str]]],
    ratings: Iterable[Ratings],
    *,
    k: int = SEGMENTS_PER_CLASS,
) -> SegmentMetrics:
    """Return what a submission scores.

    Args:
        submission: Each class once, with its segments (see ``segment_name``), the best first.
        ratings: Of all videos. Where a segment has two ratings for one class, the last one counts.
        k: How many segments of each class count.
    """
    rated: dict[int, dict[str, bool]] = {}
    for of_video in ratings:
        for segment, index, is_shown in of_video.named():
            rated.setdefault(index, {})[segment] = is_shown
    positives = {index: sum(own.values()) for index, own in rated.items()}
    precisions = {
        index: _average_precision(segments[:k], rated[index], positives[index])
        for index, segments in submission
        if positives.get(index)
    }
    num_classes = sum(1 for count in positives.values() if count)
    return SegmentMetrics(
        k=k,
        map_at_k=sum(precisions.values()) / max(num_classes, 1),
        classes_with_positives=num_classes,
        positives=sum(positives.values()),
        rated=sum(map(len, rated.values())),
    )


def _average_precision(
    segments: Sequence[str], rated: Mapping[str, bool], num_positives: int
) -> float:
    hits = np.array([rated[segment] for segment in segments if segment in rated], np.bool_)
    return average_precision(np.flatnonzero(hits) + 1, num_positives)
