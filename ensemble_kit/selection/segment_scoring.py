"""MAP@K of mixtures on rated segments, exactly; see ``segment_metrics`` for the metric.

Only pairs of segment and class that somebody has rated count, which are few: a candidate's
probabilities of them are one row in memory. Of equal scores the segment that comes first ranks
first, as in a submission.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import SEGMENTS_PER_CLASS
from ensemble_kit.data.segments import Ratings
from ensemble_kit.errors import SelectionError
from ensemble_kit.metrics import average_precisions, mean_over_classes
from ensemble_kit.predictions.candidates import Candidates
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.progress import progress
from ensemble_kit.selection.class_ranking import ClassRanking, resampled_means
from ensemble_kit.selection.judging import Scores
from ensemble_kit.selection.scoring import Term
from ensemble_kit.selection.table import READ_VALUES


@dataclass(frozen=True, eq=False)
class SegmentScorer:
    """Measures MAP@K on the rated pairs of some segments.

    Attributes:
        values: ``(M, P)``, each candidate's probabilities of the pairs, by segment.
        segments: ``(P,)``, the segment of each pair, ascending.
        classes: ``(P,)``, its class.
        is_shown: ``(P,)``, whether the segment shows it.
        num_videos: How many segments there are.
        num_classes: C.
    """

    values: Floats
    segments: NDArray[np.int64]
    classes: NDArray[np.int64]
    is_shown: NDArray[np.bool_]
    num_videos: int
    num_classes: int

    @property
    def num_positives(self) -> int:
        """The number of pairs that are shown."""
        return int(np.count_nonzero(self.is_shown))

    @cached_property
    def positives(self) -> NDArray[np.int64]:
        """How many segments show each class, ``(C,)``."""
        return np.bincount(self.classes[self.is_shown], minlength=self.num_classes)

    def part(self, is_in: NDArray[np.bool_]) -> "SegmentScorer":
        """Return what measures on some of the segments."""
        places = np.cumsum(is_in) - 1
        kept = is_in[self.segments]
        return SegmentScorer(
            self.values[:, kept],
            places[self.segments[kept]],
            self.classes[kept],
            self.is_shown[kept],
            int(np.count_nonzero(is_in)),
            self.num_classes,
        )

    def score(self, terms: Sequence[Term]) -> float:
        """Return the MAP of a mixture; 0 with no terms."""
        if not terms:
            return 0.0
        found = average_precisions(self._summed(terms), self.is_shown, self.classes, self.positives)
        return mean_over_classes(found, self.positives)

    def scores_with(
        self, terms: Sequence[Term], added: Sequence[Term], *, offered: Sequence[Term] | None = None
    ) -> list[float]:
        """Return the MAPs of a mixture with each of some terms added; see ``Measure``."""
        return [self.score([*terms, term]) for term in added]

    def resampled(
        self, mixtures: Iterable[Sequence[Term]], *, resamples: int, seed: int
    ) -> NDArray[np.float64]:
        """Return the MAPs of some mixtures on resamples of the segments; see ``Measure``."""
        mixtures = list(mixtures)
        return resampled_means(
            [
                ClassRanking.of(self._summed(terms), self.classes, self.is_shown, self.segments)
                for terms in mixtures
            ],
            [self.score(terms) for terms in mixtures],
            (self.segments[self.is_shown], self.classes[self.is_shown]),
            self.num_videos,
            self.num_classes,
            resamples=resamples,
            seed=seed,
        )

    def _summed(self, terms: Sequence[Term]) -> NDArray[np.float64]:
        scores = np.zeros(self.values.shape[1])
        for index, weight in terms:
            scores += np.multiply(self.values[index], weight, dtype=np.float64)
        return scores


@dataclass(frozen=True)
class SegmentJudge:
    """Measures MAP@K on every part of the segments.

    Attributes:
        everything: Measures on all segments.
        chosen_by: Measures on the segments that selection chooses by.
        held_out: Measures on the segments held out; None where there are none.
    """

    everything: SegmentScorer
    chosen_by: SegmentScorer
    held_out: SegmentScorer | None

    @classmethod
    def of(cls, everything: SegmentScorer, parts: Sequence[NDArray[np.bool_]]) -> "SegmentJudge":
        """Return a judge that measures on one or two parts."""
        scorers = [everything.part(is_in) for is_in in parts]
        return cls(everything, scorers[0], scorers[1] if len(scorers) > 1 else None)

    def scores(self, terms: Sequence[Term]) -> Scores:
        """Return the MAPs of a mixture; 0 with no terms."""
        held_out = None if self.held_out is None else self.held_out.score(terms)
        return Scores(self.chosen_by.score(terms), held_out, self.everything.score(terms))


def read_segments(known: Candidates, ratings: Iterable[Ratings]) -> SegmentScorer:
    """Read every candidate's probabilities of the rated pairs.

    Args:
        known: The candidates, whose videos are segments; each keeps every class.
        ratings: The ratings. Where a pair has two, the last one counts.

    Raises:
        SelectionError: A rated segment is not among the candidates' videos, a class not among
            their classes, or there are more segments than the metric counts of each class.
    """
    if len(known.ids) > SEGMENTS_PER_CLASS:
        raise SelectionError(
            f"There are {len(known.ids):,} segments, and the metric counts the first "
            f"{SEGMENTS_PER_CLASS:,} of each class only.",
            hint="Predict the rated segments alone, with `ensemble-kit predict --rated-segments`.",
        )
    places = {segment: place for place, segment in enumerate(known.ids)}
    rated: dict[tuple[int, int], bool] = {}
    for of_video in ratings:
        for segment, index, is_shown in of_video.named():
            if segment not in places:
                raise SelectionError(
                    f"Segment {segment} has ratings, but {known.candidates[0].predictions.path} "
                    "does not hold it.",
                    hint="Predict all candidates with `ensemble-kit predict --rated-segments` on "
                    "the records that --ratings names.",
                )
            rated[places[segment], index] = is_shown
    pairs = np.array(sorted(rated), np.int64).reshape(-1, 2)
    segments, columns = pairs[:, 0], np.searchsorted(known.classes, pairs[:, 1])
    columns = np.minimum(columns, known.num_classes - 1)
    strange = pairs[known.classes[columns] != pairs[:, 1], 1]
    if strange.size:
        raise SelectionError(
            f"Class {strange[0]} has ratings, and {known.candidates[0].predictions.path} has no "
            "such class.",
            hint="Name records of the candidates' vocabulary with --ratings.",
        )
    shown = [rated[segment, index] for segment, index in pairs.tolist()]
    return SegmentScorer(
        _read(known, segments, columns),
        segments,
        columns,
        np.array(shown, np.bool_),
        len(known.ids),
        known.num_classes,
    )


def _read(known: Candidates, segments: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
    """Return every candidate's probabilities of some pairs, ``(M, P)``; pairs are by segment."""
    step = max(1, READ_VALUES // known.num_classes)
    rows = []
    with progress("read candidates", len(known.candidates)) as shown:
        for candidate in known.candidates:
            parts = [np.empty(0, np.float32)]
            for start in range(0, len(known.ids), step):
                stop = min(start + step, len(known.ids))
                first, last = np.searchsorted(segments, [start, stop])
                block = candidate.taken(np.arange(start, stop))
                parts.append(block[segments[first:last] - start, columns[first:last]])
            rows.append(np.concatenate(parts))
            shown.update(len(rows), "candidates")
    return np.stack(rows)
