"""The GAP of mixtures of candidates, exactly, from a table.

A mixture's scores are ``sum_i w_i * p_i`` in float64, summed in the order in which its terms were
added; its GAP is what ``metrics`` computes, ties included. Nothing here is an estimate: a video
whose k best classes the table cannot prove is ranked from the candidates' own rows.

A search asks for the GAP of one mixture with each of many terms added, which is why an
``Extension`` exists: what is the same for all of them is done once for each block. The mixture's
scores are summed, and of each video only the pairs that some term could lift into the k best are
looked at again: the threshold argument of ``table`` once more, with the least and the most that any
term adds in place of the bounds.

One block after the other is measured with every term, by one thread for each core, so that a block
is read once, from memory or from the disk, and what all terms share stays in the core's cache. Of a
mixture itself nothing but its terms is kept, and the scores of the last one are kept for each
block that lies in memory, for the next one has mostly a term more.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.metrics import top_classes
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.selection.bootstrap import resampled_gaps
from ensemble_kit.selection.ranking import (
    ABSENT,
    HIT,
    ONE,
    Keys,
    key_flags,
    pooled_gap,
    pooled_gaps,
    to_keys,
    to_scores,
    unsettled_rows,
)
from ensemble_kit.selection.table import NUM_THREADS, READ_VALUES, Block, Table

POOL_BYTES = 2**29  # of pools that are made together, where no bound of the memory says how many
SORTED_TOGETHER = 128  # numbers of a row; sorting many more takes several times as long
KEPT_BYTES = 2**27  # of unproved videos' rows that a scorer keeps, and an extension of sums


class Term(NamedTuple):
    """A candidate, by its place in the table, and the weight of its probabilities in the sum."""

    candidate: int
    weight: float


@dataclass(frozen=True, eq=False)
class Mixture:
    """A weighted sum of candidates' probabilities over a table.

    Attributes:
        terms: What was added, in order.
        bounds: ``(N,)``; no score outside of the table exceeds it.
        is_flat: ``(N,)``, bool; whether all scores outside of the table equal the bound.
        lists_all: Whether some term lists every class of every video.
    """

    terms: tuple[Term, ...]
    bounds: NDArray[np.float64]
    is_flat: NDArray[np.bool_]
    lists_all: bool


class _Spread(NamedTuple):
    """The least and the most that any of some terms adds to a block's pairs, ``(P + 1,)``."""

    terms: tuple[Term, ...]
    least: Floats
    most: Floats


class _Sums(NamedTuple):
    """A mixture's scores of a block's pairs, float64, and one more place, which is 0."""

    terms: tuple[Term, ...]
    scores: NDArray[np.float64]


class _Live(NamedTuple):
    """The live pairs of a block's videos, padded to one width W; see ``Extension``.

    Attributes:
        pairs: ``(n, W)``, places in the block's arrays; the last place of those pads.
        sums: ``(n, W)``, the mixture's scores.
        flags: ``(n, W)``, what turns scores into keys; see ``ranking.to_keys``.
    """

    pairs: NDArray[np.int64]
    sums: NDArray[np.float64]
    flags: Keys

    def keys(self, block: Block, term: Term) -> Keys:
        """Return the keys with a term added, as if every pair were listed."""
        values = block.values[term.candidate].take(self.pairs)
        return to_keys(self.sums + _weighted(values, term.weight), self.flags)

    def taken(self, rows: NDArray[np.int64]) -> "_Live":
        """Return the live pairs of some of the videos."""
        return _Live(self.pairs[rows], self.sums[rows], self.flags[rows])


class Scorer:
    """Measures mixtures on the videos of one table.

    Args:
        table: The candidates' probabilities.
        k: How many classes of each video are pooled.
        pool_bytes: Maximum bytes of the pools that are made together.
        read_values: About how many probabilities of a candidate to read together.
        sorted_together: Numbers of a row that are sorted together.
    """

    def __init__(
        self,
        table: Table,
        k: int,
        *,
        pool_bytes: int = POOL_BYTES,
        read_values: int = READ_VALUES,
        sorted_together: int = SORTED_TOGETHER,
    ) -> None:
        self.table = table
        self.k = k
        self.read_values = read_values
        self.sorted_together = sorted_together
        self.num_together = max(1, pool_bytes // pool_size(table.num_videos, k))
        self._sums: dict[int, _Sums] = {}
        self._spreads: dict[int, _Spread] = {}
        self._rows: dict[int, Floats] = {}
        self._num_bytes = 0

    def sums(self, block: Block, terms: tuple[Term, ...]) -> NDArray[np.float64]:
        """Return a mixture's scores of a block's pairs, ``(P + 1,)``, which nobody may change."""
        before = self._sums.get(block.start)
        if before is not None and before.terms == terms[: len(before.terms)]:
            scores = summed(block, terms[len(before.terms) :], before.scores)
        else:
            scores = summed(block, terms)
        if not block.is_stored:
            self._sums[block.start] = _Sums(terms, scores)
        return scores

    def spread(self, block: Block, terms: tuple[Term, ...]) -> _Spread:
        """Return the least and the most that any of some terms adds to a block's pairs."""
        spread = self._spreads.get(block.start)
        if spread is None or spread.terms != terms:
            values = [_weighted(block.values[term.candidate], term.weight) for term in terms]
            spread = _Spread(terms, reduce(np.minimum, values), reduce(np.maximum, values))
            if not block.is_stored:
                self._spreads[block.start] = spread
        return spread

    def mixed(self, terms: Sequence[Term]) -> Mixture:
        """Return the mixture of some terms, or of none."""
        table = self.table
        bounds, is_flat = np.zeros(table.num_videos), np.ones(table.num_videos, np.bool_)
        for index, weight in terms:
            bounds += _weighted(table.bounds[index], weight)
            is_flat &= table.is_flat[index]
        lists_all = any(table.lists_all[term.candidate] for term in terms)
        return Mixture(tuple(terms), bounds, is_flat, lists_all)

    def pool(self, terms: Sequence[Term]) -> Keys:
        """Return the keys of each video's k best classes of a mixture; see ``Extension.pool``."""
        return Extension(self, self.mixed(terms[:-1]), terms[-1:]).pool(terms[-1])

    @property
    def num_videos(self) -> int:
        """The number of videos."""
        return self.table.num_videos

    @property
    def num_positives(self) -> int:
        """The number of labels of all the videos."""
        return self.table.num_positives

    def score(self, terms: Sequence[Term]) -> float:
        """Return the GAP of a mixture; 0 with no terms."""
        return pooled_gap(self.pool(terms), self.table.num_positives) if terms else 0.0

    def scores_with(
        self, terms: Sequence[Term], added: Sequence[Term], *, offered: Sequence[Term] | None = None
    ) -> list[float]:
        """Return the GAPs of a mixture with each of some terms added; see ``Measure``."""
        return Extension(self, self.mixed(terms), offered or added).gaps(added)

    def resampled(
        self, mixtures: Iterable[Sequence[Term]], *, resamples: int, seed: int
    ) -> NDArray[np.float64]:
        """Return the GAPs of some mixtures on resamples of the videos; see ``Measure``."""
        pools = map(self.pool, mixtures)
        return resampled_gaps(pools, self.table.positives, resamples=resamples, seed=seed)

    def rows_of(self, video: int) -> Floats:
        """Return all candidates' probabilities of a video, ``(M, C)``.

        The same few videos are asked for again and again, so their rows are kept.
        """
        rows = self._rows.get(video)
        if rows is None:
            places = self.table.videos[[video]]
            rows = np.concatenate([each.taken(places) for each in self.table.candidates])
            if self._num_bytes + rows.nbytes <= KEPT_BYTES:
                self._rows[video] = rows
                self._num_bytes += rows.nbytes
        return rows

    def hits_of(self, videos: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which classes are labels of some videos, ``(n, C)``."""
        is_hit = np.zeros((len(videos), self.table.num_classes), np.bool_)
        starts = [block.start for block in self.table.blocks]
        of = np.searchsorted(starts, videos, side="right") - 1
        for number in np.unique(of).tolist():
            block = self.table.blocks[number]
            classes, are_hits = block.classes, block.is_hit
            for row in np.flatnonzero(of == number).tolist():
                place = videos[row] - block.start
                start, stop = block.offsets[place : place + 2]
                is_hit[row, classes[start:stop][are_hits[start:stop]]] = True
        return is_hit


class Extension:
    """A mixture that is measured with any one of some terms added.

    Only live pairs are looked at. In each video, take the sums with the least that any term adds:
    the k-th best of them is a floor, below which the k-th best score cannot be, whatever the term.
    A pair is live if some term lifts it to the floor.

    Args:
        scorer: What measures it.
        mixture: What a term is added to.
        terms: All the terms that will be asked for, or more.
    """

    def __init__(self, scorer: Scorer, mixture: Mixture, terms: Sequence[Term]) -> None:
        self.scorer = scorer
        self.mixture = mixture
        self.terms = tuple(terms)
        self._sums: dict[int, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}

    def _laid_out(self, block: Block) -> _Live:
        sums = self.scorer.sums(block, self.mixture.terms)
        _, low, high = self.scorer.spread(block, self.terms)
        least = sums + low
        least[-1] = -np.inf
        floors = self._kth_best(least[self._padded(block.offsets, len(sums) - 1)])
        is_live = (sums + high)[:-1] >= np.repeat(floors, np.diff(block.offsets))
        live = np.append(np.flatnonzero(is_live), len(sums) - 1)
        pairs = live[self._padded(np.searchsorted(live, block.offsets), -1, self.scorer.k + 1)]
        flags = key_flags(block.is_hit.take(pairs))
        flags[pairs == len(sums) - 1] = ABSENT
        return _Live(pairs, sums[pairs], flags)

    def _kth_best(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what the k-th best score of each row is at least."""
        k = self.scorer.k
        parts = self._num_parts(scores.shape[1])
        if scores.shape[1] // parts >= k:  # of groups of scores, each the best
            scores = scores.reshape(len(scores), parts, -1).max(axis=1)
        place = scores.shape[1] - k
        if place < 0:
            return np.full(len(scores), -np.inf)
        scores.partition(place, axis=1)
        return scores[:, place]

    def _padded(self, starts: NDArray[np.int64], padding: int, width: int = 1) -> NDArray[np.int64]:
        """Return the places ``starts[i]`` to ``starts[i + 1] - 1`` as rows, padded to one width.

        It is ``width`` at least, and a multiple of the parts that it is sorted in.
        """
        counts = np.diff(starts)[:, None]
        width = max(int(counts.max()), width)
        parts = self._num_parts(width)
        columns = np.arange(-(-width // parts) * parts)
        return np.where(columns < counts, starts[:-1, None] + columns, padding)

    def _num_parts(self, width: int) -> int:
        """Return how many parts rows of a width are sorted in."""
        return -(-width // self.scorer.sorted_together)

    def gaps(self, terms: Sequence[Term]) -> list[float]:
        """Return the GAPs with each of some terms added."""
        gaps: list[float] = []
        num_positives = self.scorer.table.num_positives
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            for start in range(0, len(terms), self.scorer.num_together):
                pools = self._pools(terms[start : start + self.scorer.num_together], threads)
                parts = np.array_split(pools, NUM_THREADS)
                for found in threads.map(lambda part: pooled_gaps(part, num_positives), parts):
                    gaps += found
        return gaps

    def gap(self, term: Term) -> float:
        """Return the GAP with a term added."""
        return self.gaps([term])[0]

    def pool(self, term: Term) -> Keys:
        """Return the keys of each video's k best classes with a term added.

        Returns:
            ``(N, k)``, ascending in each row; of equal scores the lowest class is last.
        """
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            pool: Keys = self._pools([term], threads)[0]
        return pool

    def _pools(self, terms: Sequence[Term], threads: ThreadPoolExecutor) -> Keys:
        """Return the pool of each term, ``(terms, N, k)``."""
        table = self.scorer.table
        pools = np.empty((len(terms), table.num_videos, self.scorer.k), np.uint64)
        for _ in threads.map(lambda block: self._fill(pools, terms, block), table.blocks):
            pass  # what went wrong in a thread is raised here
        return pools

    def _fill(self, pools: Keys, terms: Sequence[Term], block: Block) -> None:
        """Write the rows of a block's videos to the pool of each term."""
        needed = {term.candidate for term in (*self.mixture.terms, *self.terms, *terms)}
        taken = block.taken(needed)
        live = self._laid_out(taken)
        videos = slice(block.start, block.start + block.num_videos)
        for pool, term in zip(pools[:, videos], terms, strict=True):
            pool[:] = self._ranked(live, taken, term)
            is_proved = self._is_proved(to_scores(pool[:, 0]), videos, term)
            if not is_proved.all():
                self._rank_exactly(pool, np.flatnonzero(~is_proved), block.start, term)

    def _ranked(self, live: _Live, block: Block, term: Term) -> Keys:
        """Return the keys of the k best pairs of each of a block's videos."""
        k = self.scorer.k
        keys = live.keys(block, term)
        parts = self._num_parts(keys.shape[1])
        if parts > 1:
            keys = keys.reshape(len(keys) * parts, -1)
            keys.sort(axis=1)
            keys = keys[:, -k - 1 :].reshape(len(keys) // parts, -1)
        keys.sort(axis=1)
        keys = self._listed_ranked(keys[:, -k - 1 :], live, block, term)
        unsettled = unsettled_rows(keys)
        best = keys[:, 1:]
        if unsettled.size:
            keys = self._listed_keys(live.taken(unsettled), block, term)
            order = np.argsort(~(keys >> ONE), axis=1, kind="stable")[:, k - 1 :: -1]
            best[unsettled] = np.take_along_axis(keys, order, axis=1)
        return best

    def _rank_exactly(
        self, pool: Keys, unproved: NDArray[np.int64], start: int, term: Term
    ) -> None:
        """Rank some videos of a block, whose first is at ``start``, by the candidates' own rows."""
        step = max(1, self.scorer.read_values // self.scorer.table.num_classes)
        for first in range(0, unproved.size, step):
            rows = unproved[first : first + step]
            pool[rows] = self._exact_keys(rows + start, term)

    def _exact_keys(self, videos: NDArray[np.int64], term: Term) -> Keys:
        """Return the keys of some videos' k best classes from the candidates' own rows, ``(n, k)``.

        Args:
            videos: ``(n,)``, places in the table.
            term: The term that is added.
        """
        scorer = self.scorer
        sums, are_listed = zip(*map(self._exact_sums, videos.tolist()), strict=True)
        rows = np.stack([scorer.rows_of(video)[term.candidate] for video in videos.tolist()])
        total = np.stack(sums) + _weighted(np.maximum(rows, 0), term.weight)
        is_listed = np.stack(are_listed) | (rows > -np.inf)
        classes, scores = top_classes(np.where(is_listed, total, -np.inf), scorer.k)
        is_absent = scores == -np.inf
        flags = key_flags(np.take_along_axis(scorer.hits_of(videos), classes, axis=1))
        flags[is_absent] = ABSENT
        best = np.zeros((len(videos), scorer.k), np.uint64)
        best[:, -classes.shape[1] :] = to_keys(np.where(is_absent, 0, scores), flags)[:, ::-1]
        return best

    def _exact_sums(self, video: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the mixture's scores of all classes of a video, and which classes it lists.

        They are the same for every term that is added, so they are kept: to sum them again for each
        made truncated predictions, where more videos need this, several times as slow as others.
        """
        kept = self._sums.get(video)
        if kept is None:
            rows = self.scorer.rows_of(video)
            total, is_listed = np.zeros(rows.shape[1]), np.zeros(rows.shape[1], np.bool_)
            for index, weight in self.mixture.terms:
                is_listed |= rows[index] > -np.inf
                total += _weighted(np.maximum(rows[index], 0), weight)
            kept = total, is_listed
            if (len(self._sums) + 1) * (total.nbytes + is_listed.nbytes) <= KEPT_BYTES:
                self._sums[video] = kept
        return kept

    def _lists_all(self, term: Term) -> bool:
        return self.mixture.lists_all or bool(self.scorer.table.lists_all[term.candidate])

    def _listed_ranked(self, keys: Keys, live: _Live, block: Block, term: Term) -> Keys:
        """Return the best keys of some videos without pairs that no term lists.

        A class that no term lists has the score 0, like one that is listed as 0, but it is not
        ranked. The two need be told apart only where a score of 0 is among the k best, which is
        seldom; to look at every pair took more time than the ranking.

        Args:
            keys: ``(n, k + 1)``, the best keys of each row, ascending.
            live: The live pairs.
            block: Where they lie.
            term: The term that is added.
        """
        if not self._lists_all(term):
            doubtful = np.flatnonzero(keys[:, -self.scorer.k] <= HIT)
            if doubtful.size:
                listed = np.sort(self._listed_keys(live.taken(doubtful), block, term), axis=1)
                keys[doubtful] = listed[:, -self.scorer.k - 1 :]
        return keys

    def _listed_keys(self, live: _Live, block: Block, term: Term) -> Keys:
        """Return the keys of some videos, ``ABSENT`` where no term lists a pair."""
        keys = live.keys(block, term)
        if not self._lists_all(term) and block.is_listed is not None:
            is_listed = np.zeros(live.pairs.shape, np.bool_)
            for candidate in {each.candidate for each in (*self.mixture.terms, term)}:
                is_listed |= block.is_listed[candidate].take(live.pairs)
            keys[~is_listed] = ABSENT
        return keys

    def _is_proved(
        self, lowest: NDArray[np.float64], videos: slice, term: Term
    ) -> NDArray[np.bool_]:
        """Return for which videos no class outside of the table can be among the k best.

        Args:
            lowest: ``(n,)``, each video's k-th best score in the table.
            videos: Where they are in the table.
            term: The term that is added.
        """
        table, index = self.scorer.table, term.candidate
        bounds = self.mixture.bounds[videos] + _weighted(table.bounds[index, videos], term.weight)
        is_flat = self.mixture.is_flat[videos] & table.is_flat[index, videos]
        proved: NDArray[np.bool_] = (
            table.is_whole[videos] | (lowest > bounds) | ((lowest == bounds) & is_flat)
        )
        if not self._lists_all(term):
            proved |= bounds == 0  # no term lists a class that is outside
        return proved


def summed(
    block: Block, terms: Sequence[Term], before: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the scores of a block's pairs, summed in the order of the terms.

    Args:
        block: The block.
        terms: What is summed.
        before: The sum of the terms before them, which stays as it is; None where there are none.
    """
    sums = np.zeros(block.num_pairs + 1) if before is None else before
    for place, (index, weight) in enumerate(terms):
        values = _weighted(block.values[index], weight)
        sums = np.add(sums, values, out=sums if place or before is None else None)
    return sums


def pool_size(num_videos: int, k: int) -> int:
    """Return the bytes of a pool."""
    return max(1, num_videos * k * np.dtype(np.uint64).itemsize)


def _weighted(values: Floats, weight: float) -> Floats:
    """Return values times a weight, in float64; the values themselves where it is 1."""
    return values if weight == 1 else np.multiply(values, weight, dtype=np.float64)
