"""Which ensembles are measured, and which of them is kept.

Every strategy adds one candidate after the other to ensembles that it has measured. Of equal
scores (nearer than 1e-12) the ensemble with fewer bytes is better, then the first by its members'
names.
"""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isclose, nan

from ensemble_kit.choices import Criterion, Dtype, Given, Strategy
from ensemble_kit.errors import SelectionError, SizeLimitError
from ensemble_kit.files import format_size
from ensemble_kit.predictions.candidates import Candidate
from ensemble_kit.progress import progress
from ensemble_kit.selection.judging import Measure
from ensemble_kit.selection.scoring import Term

ROUNDING = 1e-12  # scores nearer are equal: float64 sums of the same fractions differ less
MAX_ENSEMBLES = 20_000  # the most that an exhaustive search measures, in some minutes


@dataclass(frozen=True)
class Rules:
    """What a search may choose; see ``SearchMetadata`` and ``select`` for the meaning of each.

    Attributes:
        limit: Maximum size of all members, in bytes.
        start: The places of candidates that are members before the search begins; all members, and
            no search follows, where the strategy is ``given``.
    """

    strategy: Strategy | Given
    criterion: Criterion
    limit: int
    max_members: int | None
    beam_width: int
    start: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Some candidates, in the order in which they were added.

    Attributes:
        terms: A term for each addition; a candidate that was added twice has two.
        score: The score of the members' weighted mean.
        num_bytes: The bytes that all members take.
        parent: The ensemble that the last addition was made to; None where there are no members.
    """

    terms: tuple[Term, ...]
    score: float
    num_bytes: int
    parent: "Ensemble | None"

    @property
    def members(self) -> tuple[int, ...]:
        """The candidates' places, each as often as it was added."""
        return tuple(term.candidate for term in self.terms)

    @property
    def key(self) -> tuple[int, ...]:
        """The members' places in ascending order: the same for ensembles of the same members."""
        return tuple(sorted(self.members))

    @property
    def additions(self) -> "tuple[Ensemble, ...]":
        """The ensembles that led here, from one member on; the last is this one."""
        before = self.parent.additions if self.parent else ()
        return (*before, self) if self.terms else before


def num_ensembles(names: Sequence[str], most: int) -> int:
    """Return how many ensembles there are of at most some members, the one without any included.

    Args:
        names: The candidates' names, one of them for each precision; each may be a member once.
        most: The most members.
    """
    counts = [1] + [0] * most  # ensembles of each number of members, of the names so far
    for number in Counter(names).values():
        for size in range(most, 0, -1):
            counts[size] += number * counts[size - 1]
    return sum(counts)


@dataclass
class Search:
    """Measures ensembles, each of them once.

    Attributes:
        measure: What measures the ensembles.
        candidates: The candidates.
        weights: What each candidate's probabilities are multiplied by in the sum.
        rules: What may be chosen.
        shared_bytes: What an ensemble takes beside its members.
        dtypes: The precisions that may be chosen; None for all.
        measured: Every ensemble that was measured, by its key.
    """

    measure: Measure
    candidates: Sequence[Candidate]
    weights: Sequence[float]
    rules: Rules
    shared_bytes: int = 0
    dtypes: frozenset[Dtype | None] | None = None
    measured: dict[tuple[int, ...], Ensemble] = field(default_factory=dict)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """What each candidate adds."""
        return tuple(Term(index, weight) for index, weight in enumerate(self.weights))

    def know(self, singles: Sequence[float]) -> None:
        """Enter the scores of the candidates alone, which have been measured already."""
        nothing = self._nothing()
        for index, (candidate, score) in enumerate(zip(self.candidates, singles, strict=True)):
            num_bytes = nothing.num_bytes + candidate.num_bytes
            if num_bytes <= self.rules.limit:
                term = Term(index, self.weights[index])
                self.measured[(index,)] = Ensemble((term,), score, num_bytes, nothing)

    def run(self) -> Ensemble:
        """Return the ensemble that the strategy chooses.

        Raises:
            SizeLimitError: No candidate fits, or the members to start with do not.
            SelectionError: There are too many ensembles for an exhaustive search.
        """
        start = self._started()
        if self.rules.strategy == "given":
            return start
        if self.rules.strategy == "exhaustive":
            return self._exhausted(start)
        width = self.rules.beam_width if self.rules.strategy == "beam" else 1
        best = self._beam(start, width)
        for other in self._of_one_precision(start, width):
            is_equal = abs(other.score - best.score) <= ROUNDING
            if self._order(other) < self._order(best) if is_equal else other.score > best.score:
                best = other
        return best

    def _of_one_precision(self, start: Ensemble, width: int) -> list[Ensemble]:
        """Return what the strategy chooses among the candidates of each precision alone.

        It adds the best candidate that fits, so that it would rather fill the limit with a few fine
        members than with many coarse ones. Where no candidate stands in several precisions there
        is nothing to compare; one that has none, such as a CSV, goes with each.
        """
        is_free = max(Counter(each.name for each in self.candidates).values()) > 1
        if not is_free or self.dtypes is not None:
            return []
        precisions = dict.fromkeys(each.dtype for each in self.candidates if each.dtype is not None)
        alone = [replace(self, dtypes=frozenset({dtype, None})) for dtype in precisions]
        return [found for each in alone if (found := each._beam(start, width)).terms]

    def _nothing(self) -> Ensemble:
        """Return the ensemble without members."""
        return Ensemble((), 0.0, self.shared_bytes, None)

    def _started(self) -> Ensemble:
        """Return the ensemble of the members to start with."""
        ensemble = self._nothing()
        if not self.rules.start:
            self._refuse_limit()
        for index in self.rules.start:
            num_bytes = ensemble.num_bytes + self.candidates[index].num_bytes
            if num_bytes > self.rules.limit:
                names = ", ".join(self.candidates[place].name for place in self.rules.start)
                given = "given" if self.rules.strategy == "given" else "to start with"
                raise SizeLimitError(
                    f"The members {given} ({names}) do not fit in {format_size(self.rules.limit)}.",
                    hint="Raise --max-size, or name fewer.",
                )
            (ensemble,) = self._extended(ensemble, [index])
        return ensemble

    def _refuse_limit(self) -> None:
        smallest = min(self.candidates, key=lambda each: (each.num_bytes, each.name))
        size, limit = self.shared_bytes + smallest.num_bytes, self.rules.limit
        if size > limit:
            raise SizeLimitError(
                f"No candidate fits in {format_size(limit)}: {smallest.name}, the smallest, takes "
                f"{format_size(size, like=limit)}.{self._coarser(smallest)}",
                hint="Raise --max-size, or train a smaller sub-model.",
            )

    def _coarser(self, candidate: Candidate) -> str:
        """Say in which precision a candidate would fit, if there is one."""
        metadata = candidate.predictions.metadata
        sizes = metadata.model.bytes_by_dtype if metadata and metadata.model else None
        for dtype, size in (sizes or {}).items():
            if self.shared_bytes + size <= self.rules.limit:
                return f" In {dtype} it would fit."
        return ""

    def _beam(self, start: Ensemble, width: int) -> Ensemble:
        """Follow the best ensembles of each number of members, until the best is no better.

        With replacement, the search goes on to the last addition that is allowed: an addition that
        does not help by itself may prepare one that does.
        """
        best, level = start, [start]
        goes_on = self.rules.strategy == "replacement"
        while level:
            longer = dict.fromkeys(
                each
                for ensemble in level
                for each in self._extended(ensemble, self._choices(ensemble))
            )
            level = self._best(longer, width)
            if level and (not best.terms or level[0].score > best.score + ROUNDING):
                best = level[0]
            elif not goes_on:
                break
        return best

    def _exhausted(self, start: Ensemble) -> Ensemble:
        """Measure every ensemble that fits."""
        number = self._refuse_number(start)
        waiting = [start]
        ensembles = [start] if start.terms else []
        with progress("measure ensembles", number) as shown:
            while waiting:
                ensemble = waiting.pop()
                last = max(set(ensemble.members) - set(self.rules.start), default=-1)
                later = [index for index in self._choices(ensemble) if index > last]
                extended = self._extended(ensemble, later)
                ensembles += extended
                shown.update(len(ensembles), "ensembles")
                waiting += [
                    longer
                    for longer in extended
                    if any(index > longer.members[-1] for index in self._choices(longer))
                ]
        return self._best(ensembles, 1)[0]

    def in_order_of_gain(self, ensemble: Ensemble) -> Ensemble:
        """Return an ensemble as if its members had been added one by one, each time the best.

        An exhaustive search adds them in the order of the candidates, which says nothing. The
        members to start with stay the first.
        """
        ordered = self._nothing()
        left = {term.candidate: term for term in ensemble.terms}
        while left:
            given = [index for index in self.rules.start if index in left][:1]
            terms = [left[index] for index in given or left]
            scores = self.measure.scores_with(ordered.terms, terms)
            longer = [
                Ensemble(
                    (*ordered.terms, term),
                    score,
                    ordered.num_bytes + self.candidates[term.candidate].num_bytes,
                    ordered,
                )
                for term, score in zip(terms, scores, strict=True)
            ]
            ordered = min(longer, key=lambda each: (-each.score, self._order(each)))
            del left[ordered.terms[-1].candidate]
        return ordered

    def _refuse_number(self, start: Ensemble) -> int:
        """Return how many ensembles there are at most, or raise if they are too many."""
        started = {self.candidates[index].name for index in start.members}
        names = [each.name for each in self.candidates if each.name not in started]
        most = len(names)
        if self.rules.max_members is not None:
            most = max(0, min(most, self.rules.max_members - len(started)))
        number = num_ensembles(names, most)
        if number > MAX_ENSEMBLES:
            raise SelectionError(
                f"There are {number:,} ensembles of {len(names) + len(started)} candidates; an "
                f"exhaustive search measures {MAX_ENSEMBLES:,} at most.",
                hint="Limit --max-members, leave candidates out with --exclude, or use --strategy "
                "beam.",
            )
        return number

    def _choices(self, ensemble: Ensemble) -> list[int]:
        """Return the candidates that may be added."""
        most = self.rules.max_members
        if most is not None and len(ensemble.terms) >= most:
            return []
        members, left = set(ensemble.members), self.rules.limit - ensemble.num_bytes
        names = {self.candidates[index].name for index in members}
        may_repeat = self.rules.strategy == "replacement"
        return [
            index
            for index, candidate in enumerate(self.candidates)
            if (may_repeat if index in members else self._may_join(candidate, names, left))
        ]

    def _may_join(self, candidate: Candidate, names: Container[str], left: int) -> bool:
        """Return whether a candidate fits, and is no member in another precision."""
        is_allowed = self.dtypes is None or candidate.dtype in self.dtypes
        return is_allowed and candidate.name not in names and candidate.num_bytes <= left

    def _extended(self, ensemble: Ensemble, choices: Sequence[int]) -> list[Ensemble]:
        """Return an ensemble with each of some candidates added, all of them measured."""
        extended = []
        for index in choices:
            is_new = index not in ensemble.members
            added = self.candidates[index].num_bytes if is_new else 0
            term = Term(index, self.weights[index])
            num_bytes = ensemble.num_bytes + added
            extended.append(Ensemble((*ensemble.terms, term), nan, num_bytes, ensemble))
        new = [longer for longer in extended if longer.key not in self.measured]
        if new:
            terms = [longer.terms[-1] for longer in new]
            scores = self.measure.scores_with(ensemble.terms, terms, offered=self.terms)
            for longer, score in zip(new, scores, strict=True):
                self.measured[longer.key] = replace(longer, score=score)
        return [self.measured[longer.key] for longer in extended]

    def _best(self, ensembles: Iterable[Ensemble], count: int) -> list[Ensemble]:
        """Return the best of some ensembles, best first."""
        left = {ensemble: self._worth(ensemble) for ensemble in ensembles}
        chosen: list[Ensemble] = []
        while left and len(chosen) < count:
            highest = max(left.values())
            equal = [
                ensemble
                for ensemble, worth in left.items()
                if isclose(worth, highest, rel_tol=ROUNDING, abs_tol=ROUNDING)
            ]
            chosen.append(min(equal, key=self._order))
            del left[chosen[-1]]
        return chosen

    def _worth(self, ensemble: Ensemble) -> float:
        """Return what ensembles are compared by: the score, or the last gain for each byte added.

        A gain for each byte is scaled by the limit: without that it would be as small as the
        differences that ``_best`` takes for rounding. An addition that gains nothing is worth what
        it loses; one that gains something and takes no bytes is worth more than all that do.
        """
        before = ensemble.parent
        if self.rules.criterion == "gain" or before is None or not before.terms:
            return ensemble.score
        gain, added = ensemble.score - before.score, ensemble.num_bytes - before.num_bytes
        if gain <= ROUNDING:
            return min(gain, 0.0)
        return gain * self.rules.limit / added if added else inf

    def _order(self, ensemble: Ensemble) -> tuple[int, tuple[str, ...]]:
        names = tuple(self.candidates[index].name for index in ensemble.members)
        return ensemble.num_bytes, names
