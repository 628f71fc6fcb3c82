"""What measures ensembles: on the videos that selection chose by, on those held out, and on all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.selection.ranking import Keys, pooled_gap
from ensemble_kit.selection.scoring import POOL_BYTES, Scorer, Term
from ensemble_kit.selection.table import Table


class Measure(Protocol):
    """Measures mixtures of candidates on some videos by one metric.

    A mixture is ``sum_i w_i * p_i`` over its terms, in float64, summed in the order of the terms.
    """

    @property
    def num_videos(self) -> int:
        """The number of videos."""

    @property
    def num_positives(self) -> int:
        """The number of labels of all the videos."""

    def score(self, terms: Sequence[Term]) -> float:
        """Return the score of a mixture; 0 with no terms."""

    def scores_with(
        self, terms: Sequence[Term], added: Sequence[Term], *, offered: Sequence[Term] | None = None
    ) -> list[float]:
        """Return the scores of a mixture with each of some terms added.

        Args:
            terms: The mixture.
            added: The terms to add, each for itself.
            offered: All terms that a search may add, of which ``added`` are some; what the same
                ones need is then computed once for all steps of a search.
        """

    def resampled(
        self, mixtures: Iterable[Sequence[Term]], *, resamples: int, seed: int
    ) -> NDArray[np.float64]:
        """Return the scores of some mixtures on the same resamples, ``(mixtures, resamples)``.

        Args:
            mixtures: The mixtures.
            resamples: How often as many videos as there are are drawn, with replacement.
            seed: The seed of the draws.
        """


class Scores(NamedTuple):
    """Scores of one ensemble.

    Attributes:
        chosen_by: On the videos that selection chose by.
        held_out: On the videos that it held out; None where there are none.
        overall: On all of them together.
    """

    chosen_by: float
    held_out: float | None
    overall: float


class Judge(Protocol):
    """Measures ensembles on every part of the videos."""

    @property
    def chosen_by(self) -> Measure:
        """Measures on the videos that selection chooses by."""

    @property
    def held_out(self) -> Measure | None:
        """Measures on the videos held out; None where there are none."""

    def scores(self, terms: Sequence[Term]) -> Scores:
        """Return the scores of a mixture; 0 with no terms."""


@dataclass(frozen=True)
class GapJudge:
    """Measures GAP on every part of the videos.

    Attributes:
        chosen_by: Measures on the videos that selection chooses by.
        held_out: Measures on the videos held out; None where there are none.
    """

    chosen_by: Scorer
    held_out: Scorer | None

    @classmethod
    def of(cls, tables: Sequence[Table], k: int, *, pool_bytes: int = POOL_BYTES) -> "GapJudge":
        """Return a judge that measures on one or two tables."""
        scorers = [Scorer(table, k, pool_bytes=pool_bytes) for table in tables]
        return cls(scorers[0], scorers[1] if len(scorers) > 1 else None)

    def scores(self, terms: Sequence[Term]) -> Scores:
        """Return the GAPs of a mixture; 0 with no terms."""
        if not terms:
            return Scores(0.0, None if self.held_out is None else 0.0, 0.0)
        scorers = [self.chosen_by, *([self.held_out] if self.held_out else [])]
        pools = [scorer.pool(terms) for scorer in scorers]
        parts = [
            pooled_gap(pool, scorer.num_positives)
            for pool, scorer in zip(pools, scorers, strict=True)
        ]
        if len(parts) == 1:
            return Scores(parts[0], None, parts[0])
        return Scores(parts[0], parts[1], _overall(pools, scorers))


def _overall(pools: Sequence[Keys], scorers: Sequence[Scorer]) -> float:
    """Return the GAP of the pools of all parts, in the order of all videos."""
    joined = np.empty((sum(map(len, pools)), pools[0].shape[1]), np.uint64)
    for pool, scorer in zip(pools, scorers, strict=True):
        joined[scorer.table.videos] = pool
    return pooled_gap(joined, sum(scorer.num_positives for scorer in scorers))
