"""What a finished search says in ``selection.json``."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit._version import __version__
from ensemble_kit.choices import CONFIDENCE, Dtype, Given, Metric, Mixing, Strategy
from ensemble_kit.files import format_size
from ensemble_kit.predictions.candidates import Candidate, Candidates
from ensemble_kit.selection.bootstrap import interval
from ensemble_kit.selection.judging import Judge, Measure, Scores
from ensemble_kit.selection.scoring import Scorer, Term
from ensemble_kit.selection.search import ROUNDING, Ensemble, Rules
from ensemble_kit.selection.table import NUM_THREADS
from ensemble_kit.selection.truncation import gap_bounds, is_decided, truncated
from ensemble_kit.store.provenance import FileMetadata, ModelMetadata
from ensemble_kit.store.selection_file import (
    BootstrapMetadata,
    CandidateMetadata,
    ConfirmMetadata,
    FrontierMetadata,
    OptimisedMetadata,
    PartMetadata,
    SearchMetadata,
    SelectedMetadata,
    SelectionMetadata,
    StepMetadata,
    TruncationMetadata,
)
from ensemble_kit.wording import counted, metric_name

MEANS: Mapping[Mixing, str] = {
    "uniform": "the uniform mean of the members' probabilities",
    "gap": "the mean of the members' probabilities, each weighted by its own {metric}",
    "optimised": "the uniform mean of the members' probabilities, whose coefficients were "
    "optimised afterwards",
}
RULES: Mapping[Strategy | Given, str] = {
    "greedy": "Greedy, without replacement: start from the best candidate that fits; of those that "
    "fit in the remaining bytes, add the one with {what}, until none raises the {metric}",
    "replacement": "Greedy, with replacement: start from the best candidate that fits; of those "
    "that fit in the remaining bytes or are members already, add the one with {what}, and keep the "
    "best of the first {most} ensembles",
    "beam": "Beam search: add each candidate that fits in the remaining bytes to each of the "
    "{width} best ensembles with the same number of members, until the best is no better",
    "exhaustive": "Exhaustive: measure every ensemble that fits",
}
GIVEN_RULE = "Members and mixing coefficients were given; nothing was chosen by the {metric}."
RULE = (
    "{rule}. Ensembles are compared by the {metric} of {mean}; of equal ensembles, the one with "
    "fewer bytes wins, then the first by name."
)


def rule_text(
    rules: Rules, mixing: Mixing | Given, metric: str, *, has_precisions: bool = False
) -> str:
    """Return in words how members were chosen."""
    if mixing == "given":
        return GIVEN_RULE.format(metric=metric)
    what = f"the best {metric}" if rules.criterion == "gain" else "the highest gain for each byte"
    text = RULES[rules.strategy].format(
        what=what, metric=metric, most=rules.max_members, width=rules.beam_width
    )
    if has_precisions and rules.strategy != "exhaustive":
        text += ". Search so among all candidates, and among those of each precision alone"
    return RULE.format(rule=text, metric=metric, mean=MEANS[mixing].format(metric=metric))


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a search.

    Attributes:
        rules: The rules of the search.
        mixing: How members are mixed.
        singles: The scores of each candidate alone.
        measured: Every ensemble that was measured.
        chosen: The ensemble that was chosen.
        members: A term for each member, with the weight that it is mixed with.
        greedy: What greedy would have chosen; None where greedy was the strategy, or where nothing
            was chosen.
    """

    rules: Rules
    mixing: Mixing | Given
    singles: tuple[Scores, ...]
    measured: tuple[Ensemble, ...]
    chosen: Ensemble
    members: tuple[Term, ...]
    greedy: Ensemble | None


@dataclass(frozen=True, eq=False)
class Writer:
    """Makes the metadata of one selection.

    Attributes:
        known: The candidates.
        judge: What measures them.
        outcome: The result of the search.
        folder: Where the selection will lie; paths are relative to it.
        metric: What ensembles are compared by.
        k: The k of GAP@k and mAP@k.
        resamples: How often videos are drawn for intervals.
        seed: The seed of the draws.
    """

    known: Candidates
    judge: Judge
    outcome: Outcome
    folder: Path
    metric: Metric
    k: int
    resamples: int
    seed: int

    def selection(
        self, *, confirm: float, labels_path: Path | None, excluded: tuple[str, ...]
    ) -> SelectionMetadata:
        """Return the whole selection; the arguments are those of ``select``."""
        rules, outcome = self.outcome.rules, self.outcome
        files = self._files()
        scores = self.judge.scores(outcome.members)
        return SelectionMetadata(
            kit_version=__version__,
            metric=self.metric,
            k=self.k,
            dtypes=self.known.dtypes,
            max_size=rules.limit,
            mixing=outcome.mixing,
            rule=rule_text(
                rules,
                outcome.mixing,
                metric_name(self.metric),
                has_precisions=len(self.known.dtypes) > 1,
            ),
            search=self._search(excluded),
            dataset_sha256=self.known.dataset_sha256,
            vocabulary_sha256=self.known.vocabulary_sha256,
            labels=None if labels_path is None else self._file(labels_path),
            videos=len(self.known.ids),
            left_out=self.known.num_left_out,
            positives=self.known.labels.classes.size,
            score=scores.overall,
            bytes=outcome.chosen.num_bytes,
            shared_bytes=self.known.shared_bytes,
            members=self._members(files),
            path=self._path(),
            frontier=self._frontier(outcome.measured),
            frontiers=self._frontiers(),
            candidates=self._candidates(files),
            confirm=self._confirm(scores, confirm),
            bootstrap=BootstrapMetadata(resamples=self.resamples, level=CONFIDENCE, seed=self.seed),
            optimised=self._optimised(scores) if outcome.mixing == "optimised" else None,
            truncation=self._truncation(),
        )

    def _search(self, excluded: tuple[str, ...]) -> SearchMetadata:
        rules, greedy = self.outcome.rules, self.outcome.greedy
        return SearchMetadata(
            strategy=rules.strategy,
            criterion=rules.criterion,
            max_members=rules.max_members,
            beam_width=rules.beam_width if rules.strategy == "beam" else None,
            start=tuple(self.known.candidates[index].name for index in rules.start),
            excluded=excluded,
            evaluations=len(self.outcome.measured),
            greedy_score=None if greedy is None else greedy.score,
            greedy_path=None
            if greedy is None
            else tuple(self.known.candidates[index].name for index in greedy.members),
        )

    def _optimised(self, scores: Scores) -> OptimisedMetadata:
        uniform = self.judge.scores(self.outcome.chosen.terms)
        return OptimisedMetadata(
            uniform_score=uniform.chosen_by,
            score=scores.chosen_by,
            confirmed_uniform_score=uniform.held_out,
            confirmed_score=scores.held_out,
        )

    def _truncation(self) -> TruncationMetadata | None:
        outcome, scorer = self.outcome, self.judge.chosen_by
        if not isinstance(
            scorer, Scorer
        ):  # by another metric than GAP, truncated files are refused
            return None
        places = truncated(scorer.table)
        if not places:
            return None
        decided = None
        if outcome.mixing != "gap":  # there the weights too depend on what was left out
            decided = is_decided(scorer, outcome.rules, outcome.chosen, outcome.measured)
        return TruncationMetadata(
            candidates=tuple(dict.fromkeys(self.known.candidates[index].name for index in places)),
            score_bounds=gap_bounds(scorer, outcome.members),
            is_decided=decided,
        )

    def _confirm(self, scores: Scores, fraction: float) -> ConfirmMetadata | None:
        if self.judge.held_out is None or scores.held_out is None:
            return None
        return ConfirmMetadata(
            fraction=fraction,
            chosen_by=self._part(self.judge.chosen_by, scores.chosen_by),
            held_out=self._part(self.judge.held_out, scores.held_out),
        )

    def _part(self, measure: Measure, score: float) -> PartMetadata:
        drawn = self._resampled([self.outcome.members], measure)
        return PartMetadata(
            videos=measure.num_videos,
            positives=measure.num_positives,
            score=score,
            interval=interval(drawn[0]) if self.resamples else None,
        )

    def _members(self, files: Sequence[FileMetadata]) -> tuple[SelectedMetadata, ...]:
        terms, singles = self.outcome.members, self.outcome.singles
        total = sum(term.weight for term in terms)
        return tuple(
            SelectedMetadata(
                name=self.known.candidates[term.candidate].name,
                dtype=self.known.candidates[term.candidate].dtype,
                coefficient=term.weight / total,
                bytes=self.known.candidates[term.candidate].num_bytes,
                score=singles[term.candidate].overall,
                score_without=self.judge.scores(
                    [each for each in terms if each is not term]
                ).overall,
                predictions=files[term.candidate],
                model=self._model(self.known.candidates[term.candidate]),
            )
            for term in terms
        )

    def _path(self) -> tuple[StepMetadata, ...]:
        ensembles = self.outcome.chosen.additions
        measure = self.judge.held_out or self.judge.chosen_by
        drawn = self._resampled((each.terms for each in ensembles), measure)
        steps: list[StepMetadata] = []
        for index, ensemble in enumerate(ensembles):
            before = steps[-1] if steps else None
            confirmed = self._held_out(ensemble.terms)
            gains = interval(np.diff(drawn, axis=0, prepend=0)[index]) if self.resamples else None
            steps.append(
                StepMetadata(
                    added=self.known.candidates[ensemble.members[-1]].name,
                    dtype=self.known.candidates[ensemble.members[-1]].dtype,
                    score=ensemble.score,
                    gain=ensemble.score - (before.score if before else 0),
                    bytes=ensemble.num_bytes,
                    confirmed_score=confirmed,
                    confirmed_gain=None
                    if confirmed is None
                    else confirmed - ((before and before.confirmed_score) or 0),
                    interval=interval(drawn[index]) if self.resamples else None,
                    gain_interval=gains,
                    is_distinguishable=None if gains is None else gains[0] > 0,
                )
            )
        return tuple(steps)

    def _frontiers(self) -> dict[Dtype, tuple[FrontierMetadata, ...]]:
        """Return the frontier of the ensembles of each precision alone, if there are several."""
        frontiers: dict[Dtype, tuple[FrontierMetadata, ...]] = {}
        candidates = self.known.candidates
        for dtype in self.known.dtypes if len(self.known.dtypes) > 1 else ():
            frontiers[dtype] = self._frontier(
                ensemble
                for ensemble in self.outcome.measured
                if all(candidates[index].dtype == dtype for index in ensemble.members)
            )
        return frontiers

    def _frontier(self, measured: Iterable[Ensemble]) -> tuple[FrontierMetadata, ...]:
        frontier: list[FrontierMetadata] = []
        best = 0.0
        candidates = self.known.candidates
        by_bytes = sorted(measured, key=lambda each: (each.num_bytes, -each.score, len(each.terms)))
        for ensemble in by_bytes:
            if frontier and ensemble.score <= best + ROUNDING:
                continue
            best = ensemble.score
            frontier.append(
                FrontierMetadata(
                    members=tuple(candidates[index].name for index in ensemble.members),
                    dtypes=tuple(candidates[index].dtype for index in ensemble.members),
                    score=ensemble.score,
                    confirmed_score=self._held_out(ensemble.terms),
                    bytes=ensemble.num_bytes,
                )
            )
        return tuple(frontier)

    def _candidates(self, files: Sequence[FileMetadata]) -> tuple[CandidateMetadata, ...]:
        candidates, outcome = [], self.outcome
        measured = zip(self.known.candidates, outcome.singles, strict=True)
        for index, (candidate, scores) in enumerate(measured):
            metadata = candidate.predictions.metadata
            model = metadata.model if metadata else None
            sizes = model.bytes_by_dtype if model is not None else None
            candidates.append(
                CandidateMetadata(
                    name=candidate.name,
                    dtype=candidate.dtype,
                    score=scores.chosen_by,
                    confirmed_score=scores.held_out,
                    bytes=candidate.num_bytes,
                    bytes_by_dtype=sizes,
                    num_values=model.num_values if model is not None and sizes else None,
                    skipped=None if index in outcome.chosen.members else self._reason(candidate),
                    predictions=files[index],
                    top_k=metadata.top_k if metadata else None,
                )
            )
        return tuple(sorted(candidates, key=lambda each: (-each.score, each.bytes, each.name)))

    def _files(self) -> list[FileMetadata]:
        """Return where every candidate's predictions lie, and their hashes."""
        paths = [candidate.predictions.path for candidate in self.known.candidates]
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            return list(threads.map(self._file, paths))

    def _file(self, path: Path) -> FileMetadata:
        """Return where a file lies from the selection, and its hash."""
        return FileMetadata.of(path, self.folder)

    def _held_out(self, terms: Sequence[Term]) -> float | None:
        return None if self.judge.held_out is None else self.judge.held_out.score(terms)

    def _resampled(
        self, mixtures: Iterable[Sequence[Term]], measure: Measure
    ) -> NDArray[np.float64]:
        return measure.resampled(mixtures, resamples=self.resamples, seed=self.seed)

    def _model(self, member: Candidate) -> ModelMetadata | None:
        """Return the metadata of a member's model, with its path relative to the selection."""
        metadata = member.predictions.metadata
        if metadata is None or metadata.model is None:
            return None
        return metadata.model.at(member.predictions.home, self.folder)

    def _reason(self, candidate: Candidate) -> str:
        """Say why a candidate is no member."""
        chosen, rules = self.outcome.chosen, self.outcome.rules
        for index in chosen.members:
            member = self.known.candidates[index]
            if member.name == candidate.name:
                return f"It is a member in {member.dtype}."
        if rules.strategy == "given":
            return "It was given no coefficient."
        if rules.max_members is not None and len(chosen.terms) >= rules.max_members:
            return f"The ensemble has {counted(rules.max_members, 'member')} already."
        left = rules.limit - chosen.num_bytes
        if candidate.num_bytes > left:
            size = format_size(candidate.num_bytes)
            return f"It takes {size}, but only {format_size(left)} remain."
        return f"It does not raise the {metric_name(self.metric)}."


def distinct(terms: Sequence[Term]) -> list[Term]:
    """Return one term for each candidate, in the order of first additions, with summed weights."""
    weights: dict[int, float] = {}
    for term in terms:
        weights[term.candidate] = weights.get(term.candidate, 0.0) + term.weight
    return [Term(candidate, weight) for candidate, weight in weights.items()]
