"""GAPs on the videos that selection chose by, on those it held out, and on all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ensemble_kit.selection.ranking import Keys, pooled_gap
from ensemble_kit.selection.scoring import POOL_BYTES, Scorer, Term
from ensemble_kit.selection.table import Table


class Gaps(NamedTuple):
    """GAPs of one ensemble.

    Attributes:
        chosen_by: On the videos that selection chose by.
        held_out: On the videos that it held out; None where there are none.
        overall: On all of them together.
    """

    chosen_by: float
    held_out: float | None
    overall: float


@dataclass(frozen=True)
class Judge:
    """Measures ensembles on every part of the videos.

    Attributes:
        chosen_by: Measures on the videos that selection chooses by.
        held_out: Measures on the videos held out; None where there are none.
    """

    chosen_by: Scorer
    held_out: Scorer | None

    @classmethod
    def of(cls, tables: Sequence[Table], k: int, *, pool_bytes: int = POOL_BYTES) -> "Judge":
        """Return a judge that measures on one or two tables."""
        scorers = [Scorer(table, k, pool_bytes=pool_bytes) for table in tables]
        return cls(scorers[0], scorers[1] if len(scorers) > 1 else None)

    @property
    def scorers(self) -> list[Scorer]:
        """The scorer of each part."""
        return [self.chosen_by] if self.held_out is None else [self.chosen_by, self.held_out]

    @property
    def last(self) -> Scorer:
        """The scorer of the videos held out if there are any, else the only scorer."""
        return self.scorers[-1]

    def gaps(self, terms: Sequence[Term]) -> Gaps:
        """Return the GAPs of a mixture; 0 with no terms."""
        if not terms:
            return Gaps(0.0, None if self.held_out is None else 0.0, 0.0)
        pools = [scorer.pool(terms) for scorer in self.scorers]
        parts = [
            pooled_gap(pool, scorer.table.num_positives)
            for pool, scorer in zip(pools, self.scorers, strict=True)
        ]
        if self.held_out is None:
            return Gaps(parts[0], None, parts[0])
        return Gaps(parts[0], parts[1], self._overall(pools))

    def _overall(self, pools: Sequence[Keys]) -> float:
        num_videos = sum(len(pool) for pool in pools)
        joined = np.empty((num_videos, pools[0].shape[1]), np.uint64)
        for pool, scorer in zip(pools, self.scorers, strict=True):
            joined[scorer.table.videos] = pool
        return pooled_gap(joined, sum(scorer.table.num_positives for scorer in self.scorers))
