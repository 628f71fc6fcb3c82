"""Macro mAP of mixtures of candidates, exactly, from all of their probabilities.

The metric is that of ``ranking_metrics``: the mean, over the classes that some video has, of the
average precision of all videos' ranking in the class, where equal scores share the worst of their
places. A mixture's scores are summed as for GAP, see ``judging.Measure``.

One block of classes after the other is measured with every term, by one thread for each core.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.progress import progress
from ensemble_kit.ranking_metrics import shared_average_precision
from ensemble_kit.selection.bootstrap import centred, drawn_counts
from ensemble_kit.selection.class_table import ClassBlock, ClassTable
from ensemble_kit.selection.judging import Scores
from ensemble_kit.selection.scoring import Term
from ensemble_kit.selection.table import NUM_THREADS

Matrix = NDArray[np.float64]
PLACE = 45  # a score's bits above these are its place: its exponent, and 7 bits of its mantissa


@dataclass(frozen=True, eq=False)
class ClassScorer:
    """Measures macro mAP on some videos of a table.

    Attributes:
        table: The candidates' probabilities.
        part: The videos that count.
    """

    table: ClassTable
    part: slice

    @property
    def num_videos(self) -> int:
        """The number of videos."""
        return int(self.part.stop - self.part.start)

    @property
    def num_positives(self) -> int:
        """The number of labels of all the videos."""
        return sum(self._hits(place).size for place in range(len(self.table.hits)))

    def score(self, terms: Sequence[Term]) -> float:
        """Return the macro mAP of a mixture; 0 with no terms."""
        return self.scores_with(terms[:-1], terms[-1:])[0] if terms else 0.0

    def scores_with(
        self, terms: Sequence[Term], added: Sequence[Term], *, offered: Sequence[Term] | None = None
    ) -> list[float]:
        """Return the macro mAPs of a mixture with each of some terms added; see ``Measure``."""
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            blocks = threads.map(
                lambda block: self._block_precisions(block, terms, added), self.table.blocks
            )
            precisions = np.concatenate(list(blocks), axis=1)
        return [_mean(row) for row in precisions]

    def _block_precisions(
        self, block: ClassBlock, terms: Sequence[Term], added: Sequence[Term]
    ) -> Matrix:
        """Return the average precision of each class with each term, ``(added, classes)``."""
        before = summed(block, terms)
        return np.stack([self.precisions(block, summed(block, [term], before)) for term in added])

    def precisions(self, block: ClassBlock, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the average precision of each class of a block; NaN where no video has it.

        Args:
            block: The block.
            scores: ``(classes * N,)``, of all videos of the table.
        """
        rows = scores.reshape(len(block.places), -1)[:, self.part]
        precisions = np.full(len(rows), np.nan)
        for index, (row, place) in enumerate(zip(rows, block.places, strict=True)):
            hits = self._hits(place)
            if hits.size:
                own = np.sort(row[hits])
                precisions[index] = shared_average_precision(own, counts_at_least(row, own))
        return precisions

    def resampled(self, mixtures: Iterable[Sequence[Term]], *, resamples: int, seed: int) -> Matrix:
        """Return the macro mAPs of some mixtures on resamples of the videos; see ``Measure``."""
        counts = drawn_counts(self.num_videos, resamples=resamples, seed=seed)
        num_blocks = len(self.table.blocks)
        mixtures = list(mixtures)
        asked = [(terms, block) for terms in mixtures for block in self.table.blocks]
        sums: list[NDArray[np.float64]] = []
        with ThreadPoolExecutor(NUM_THREADS) as threads, progress("resample", len(asked)) as shown:
            for found in threads.map(lambda pair: self._resampled_sums(counts, *pair), asked):
                sums.append(found)
                shown.update(len(sums), "blocks of classes")
        shape = len(mixtures), num_blocks, 2, resamples
        totals = np.array(sums).reshape(shape).sum(axis=1)
        drawn: Matrix = totals[:, 0] / np.maximum(totals[:, 1], 1)
        return centred(drawn, [self.score(terms) for terms in mixtures])

    def _resampled_sums(
        self, counts: NDArray[np.integer[Any]], terms: Sequence[Term], block: ClassBlock
    ) -> Matrix:
        """Return the sum of a block's average precisions on each resample, and of how many classes.

        Args:
            counts: How often each video was drawn, ``(n, resamples)``.
            terms: The mixture.
            block: The block.

        Returns:
            ``(2, resamples)``.
        """
        scores = summed(block, terms).reshape(len(block.places), -1)[:, self.part]
        sums = np.zeros((2, counts.shape[1]))
        for row, place in zip(scores, block.places, strict=True):
            precisions, has_class = resampled_precisions(row, self._hits(place), counts)
            sums += precisions, has_class
        return sums

    def _hits(self, place: int) -> NDArray[np.int64]:
        """Return the places in the part of the videos that have a class."""
        hits = self.table.hits[place]
        first, last = np.searchsorted(hits, [self.part.start, self.part.stop])
        places: NDArray[np.int64] = hits[first:last] - self.part.start
        return places


@dataclass(frozen=True)
class ClassJudge:
    """Measures macro mAP on every part of the videos.

    Attributes:
        table: The candidates' probabilities.
    """

    table: ClassTable

    @property
    def chosen_by(self) -> ClassScorer:
        """Measures on the videos that selection chooses by."""
        return ClassScorer(self.table, self.table.parts[0])

    @property
    def held_out(self) -> ClassScorer | None:
        """Measures on the videos held out; None where there are none."""
        return ClassScorer(self.table, self.table.parts[1]) if len(self.table.parts) > 1 else None

    def scores(self, terms: Sequence[Term]) -> Scores:
        """Return the macro mAPs of a mixture; 0 with no terms."""
        overall = ClassScorer(self.table, slice(0, len(self.table.videos))).score(terms)
        if self.held_out is None:
            return Scores(overall, None, overall)
        return Scores(self.chosen_by.score(terms), self.held_out.score(terms), overall)


def summed(
    block: ClassBlock, terms: Sequence[Term], before: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return a mixture's scores of a block, ``(classes * N,)``, summed in the order of the terms.

    Args:
        block: The block.
        terms: What is summed.
        before: The sum of the terms before them, which stays as it is; None where there are none.
    """
    scores = np.zeros(block.num_values) if before is None else before.copy()
    for index, weight in terms:
        scores += np.multiply(block.values[index], weight, dtype=np.float64)
    return scores


def counts_at_least(
    scores: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return how many scores are at least each of some thresholds.

    All scores are counted in a histogram whose places are as fine as the first bits of a score's
    mantissa, and only those that share a place with a threshold are sorted, as for GAP's pool (see
    ``ranking``). To sort every score took five times as long.

    Args:
        scores: ``(n,)``, at least 0.
        thresholds: ``(P,)``, some of the scores, ascending.
    """
    lowest = (thresholds[:1].view(np.int64) >> PLACE) - 1  # what is below shares a place
    places = np.maximum(scores.view(np.int64) >> PLACE, lowest) - lowest
    counts = np.bincount(places)
    own = (thresholds.view(np.int64) >> PLACE) - lowest
    is_shared = np.zeros(len(counts), np.bool_)
    is_shared[own] = True
    near = np.sort(scores[is_shared[places]])
    above = np.cumsum(np.where(is_shared, 0, counts)[::-1])[::-1]
    at_least: NDArray[np.int64] = near.size - np.searchsorted(near, thresholds) + above[own]
    return at_least


def resampled_precisions(
    scores: NDArray[np.float64], hits: NDArray[np.int64], counts: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the average precision of a class on each resample, and whether any video has it.

    A video that was drawn w times stands w times in the ranking.

    Args:
        scores: ``(n,)``, of all videos.
        hits: The videos that have the class.
        counts: How often each video was drawn, ``(n, resamples)``.
    """
    order = np.argsort(-scores)
    thresholds, groups = np.unique(-scores[hits], return_inverse=True)
    ends = np.searchsorted(-scores[order], thresholds, side="right")
    total, at_least, hits_so_far = np.zeros((3, counts.shape[1]))
    start = 0
    for group, end in enumerate(ends):
        at_least += counts[order[start:end]].sum(axis=0, dtype=np.int64)
        drawn = counts[hits[groups == group]].sum(axis=0, dtype=np.int64)
        hits_so_far += drawn
        total += drawn * hits_so_far / np.maximum(at_least, 1)
        start = end
    return total / np.maximum(hits_so_far, 1), hits_so_far > 0


def _mean(precisions: NDArray[np.float64]) -> float:
    """Return the mean over the classes that some video has; 0 where there is none."""
    known = precisions[~np.isnan(precisions)]
    return float(known.mean()) if known.size else 0.0
