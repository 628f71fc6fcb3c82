"""The challenge's mAP of mixtures of candidates, exactly, from the table that GAP is measured by.

The metric is the ``map`` of ``metrics``: each video counts in its k best classes, and the mean over
the classes that some video has is taken of the average precision of the videos that count in it,
equal scores in the order of the videos. Which classes are a video's best is proved as for GAP, see
``scoring``; candidates that leave out classes are refused before.

A pool of GAP forgets which classes its scores are of, so here each mixture is ranked whole, which
takes some twenty times as long.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import average_precisions, mean_over_classes, top_classes
from ensemble_kit.selection.class_ranking import ClassRanking, resampled_means
from ensemble_kit.selection.judging import GapJudge, Scores
from ensemble_kit.selection.scoring import Mixture, Scorer, Term, summed
from ensemble_kit.selection.table import NUM_THREADS, Block


class Best(NamedTuple):
    """The k best classes of each of n videos, best first: ``(n, k)`` each.

    Attributes:
        scores: Their scores; ``-inf`` where there are fewer than k classes.
        classes: The classes.
        is_hit: Whether they are labels of the video.
    """

    scores: NDArray[np.float64]
    classes: NDArray[np.int32]
    is_hit: NDArray[np.bool_]

    def mean_average_precision(self, positives: NDArray[np.int64]) -> float:
        """Return the mAP, given how many videos have each class, ``(C,)``."""
        is_ranked = self.scores > -np.inf
        pooled = self.scores[is_ranked], self.is_hit[is_ranked], self.classes[is_ranked]
        return mean_over_classes(average_precisions(*pooled, positives), positives)


@dataclass(frozen=True, eq=False)
class TopClassScorer:
    """Measures the challenge's mAP on the videos of one table.

    Attributes:
        scorer: What measures GAP on them.
    """

    scorer: Scorer

    @property
    def num_videos(self) -> int:
        """The number of videos."""
        return self.scorer.num_videos

    @property
    def num_positives(self) -> int:
        """The number of labels of all the videos."""
        return self.scorer.num_positives

    @cached_property
    def labels(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The video and the class of each label."""
        videos, classes = [], []
        for block in self.scorer.table.blocks:
            hits = np.flatnonzero(block.is_hit)
            videos.append(block.start + np.searchsorted(block.offsets, hits, side="right") - 1)
            classes.append(block.classes[hits])
        return np.concatenate(videos), np.concatenate(classes)

    @cached_property
    def positives(self) -> NDArray[np.int64]:
        """How many videos have each class, ``(C,)``."""
        return np.bincount(self.labels[1], minlength=self.scorer.table.num_classes)

    def score(self, terms: Sequence[Term]) -> float:
        """Return the mAP of a mixture; 0 with no terms."""
        return self.best(terms).mean_average_precision(self.positives) if terms else 0.0

    def scores_with(
        self, terms: Sequence[Term], added: Sequence[Term], *, offered: Sequence[Term] | None = None
    ) -> list[float]:
        """Return the mAPs of a mixture with each of some terms added; see ``Measure``."""
        return [self.score([*terms, term]) for term in added]

    def best(self, terms: Sequence[Term]) -> Best:
        """Return each video's k best classes of a mixture."""
        mixture = self.scorer.mixed(terms)
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            blocks = threads.map(
                lambda block: self._best_of(block, mixture), self.scorer.table.blocks
            )
            return Best(*map(np.concatenate, zip(*blocks, strict=True)))

    def _best_of(self, block: Block, mixture: Mixture) -> Best:
        """Return the best classes of a block's videos."""
        taken = block.taken({term.candidate for term in mixture.terms})
        counts = np.diff(block.offsets)
        is_pair = np.arange(max(counts.max(), self.scorer.k)) < counts[:, None]
        scores = np.full(is_pair.shape, -np.inf)
        scores[is_pair] = summed(taken, mixture.terms)[:-1]
        places = np.zeros(is_pair.shape, np.int64)
        places[is_pair] = np.arange(block.num_pairs)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.scorer.k]
        places = np.take_along_axis(places, order, axis=1)
        best = Best(
            np.take_along_axis(scores, order, axis=1), taken.classes[places], taken.is_hit[places]
        )
        videos = np.arange(block.start, block.start + block.num_videos)
        is_proved = self._is_proved(best.scores[:, -1], videos, mixture)
        for row in np.flatnonzero(~is_proved).tolist():
            self._rank_exactly(best, row, block.start + row, mixture)
        return best

    def _is_proved(
        self, lowest: NDArray[np.float64], videos: NDArray[np.int64], mixture: Mixture
    ) -> NDArray[np.bool_]:
        """Return for which videos no class outside of the table can be among the k best.

        Args:
            lowest: ``(n,)``, each video's k-th best score in the table.
            videos: Where they are in the table.
            mixture: The mixture.
        """
        bounds, is_flat = mixture.bounds[videos], mixture.is_flat[videos]
        is_whole = self.scorer.table.is_whole[videos]
        proved: NDArray[np.bool_] = is_whole | (lowest > bounds) | ((lowest == bounds) & is_flat)
        return proved

    def _rank_exactly(self, best: Best, row: int, video: int, mixture: Mixture) -> None:
        """Rank a video by the candidates' own rows."""
        rows = self.scorer.rows_of(video)
        total = np.zeros(rows.shape[1])
        for index, weight in mixture.terms:
            total += np.multiply(rows[index], weight, dtype=np.float64)
        classes, scores = top_classes(total[None], self.scorer.k)
        best.scores[row, : scores.shape[1]] = scores[0]
        best.classes[row, : scores.shape[1]] = classes[0]
        best.is_hit[row, : scores.shape[1]] = self.scorer.hits_of(np.array([video]))[0, classes[0]]

    def resampled(
        self, mixtures: Iterable[Sequence[Term]], *, resamples: int, seed: int
    ) -> NDArray[np.float64]:
        """Return the mAPs of some mixtures on resamples of the videos; see ``Measure``."""
        bests = [self.best(terms) for terms in mixtures]
        return resampled_means(
            [_ranked(best) for best in bests],
            [best.mean_average_precision(self.positives) for best in bests],
            self.labels,
            self.num_videos,
            len(self.positives),
            resamples=resamples,
            seed=seed,
        )


def _ranked(best: Best) -> ClassRanking:
    pairs = np.flatnonzero(best.scores > -np.inf)
    return ClassRanking.of(
        best.scores.reshape(-1)[pairs],
        best.classes.reshape(-1)[pairs],
        best.is_hit.reshape(-1)[pairs],
        pairs // best.scores.shape[1],
    )


@dataclass(frozen=True)
class TopClassJudge:
    """Measures the challenge's mAP on every part of the videos.

    Attributes:
        chosen_by: Measures on the videos that selection chooses by.
        held_out: Measures on the videos held out; None where there are none.
    """

    chosen_by: TopClassScorer
    held_out: TopClassScorer | None

    @classmethod
    def of(cls, judge: GapJudge) -> "TopClassJudge":
        """Return a judge that measures on the tables of one that measures GAP."""
        held_out = None if judge.held_out is None else TopClassScorer(judge.held_out)
        return cls(TopClassScorer(judge.chosen_by), held_out)

    def scores(self, terms: Sequence[Term]) -> Scores:
        """Return the mAPs of a mixture; 0 with no terms."""
        if not terms:
            return Scores(0.0, None if self.held_out is None else 0.0, 0.0)
        best = self.chosen_by.best(terms)
        score = best.mean_average_precision(self.chosen_by.positives)
        if self.held_out is None:
            return Scores(score, None, score)
        other = self.held_out.best(terms)
        videos = [each.scorer.table.videos for each in (self.chosen_by, self.held_out)]
        order = np.argsort(np.concatenate(videos))
        joined = Best(
            np.concatenate([best.scores, other.scores])[order],
            np.concatenate([best.classes, other.classes])[order],
            np.concatenate([best.is_hit, other.is_hit])[order],
        )
        positives = self.chosen_by.positives + self.held_out.positives
        return Scores(
            score,
            other.mean_average_precision(self.held_out.positives),
            joined.mean_average_precision(positives),
        )
