"""Select: the members whose averaged probabilities have the best validation GAP under a limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ensemble_kit
from ensemble_kit.candidates import Candidate, Candidates, read_candidates
from ensemble_kit.errors import SelectionError, SizeLimitError
from ensemble_kit.files import GIB, format_size, refuse_overwrite, sha256_of
from ensemble_kit.metrics import pooled_average_precision, top_hits
from ensemble_kit.predictions import dataset_sha256
from ensemble_kit.provenance import (
    CandidateRecord,
    Dtype,
    FileRecord,
    Mixing,
    ModelRecord,
    SelectedRecord,
    SelectionRecord,
    StepRecord,
)
from ensemble_kit.selections import write_selection
from ensemble_kit.workspace import RUNS

MEANS: Mapping[Mixing, str] = {
    "uniform": "the uniform mean of the members' probabilities",
    "gap": "the mean of the members' probabilities, each counted by its own GAP",
}
RULE = (
    "Greedy, without replacement, by the GAP of {mean}: from the best candidate that fits, add the "
    "one that gives the best GAP of those that fit in the bytes left, until none raises it; of "
    "equal ones, the one with fewer bytes, then by name."
)
ROUNDING = 1e-12  # GAPs nearer than this are equal: float64 sums of the same fractions differ less
BLOCK_VALUES = 2**18  # summed together: 2 MiB, which a core's cache holds while its top k is found


def find_predictions() -> list[Path]:
    """Return the validation predictions of the runs in the current folder, by run name.

    Raises:
        SelectionError: There are none.
    """
    pattern = "*/validation.safetensors"
    paths = sorted(RUNS.glob(pattern))
    if not paths:
        raise SelectionError(
            f"There are no predictions: {RUNS / pattern} matches nothing in {Path.cwd()}.",
            mend="Name predictions files, or go to a folder where `ensemble-kit train` made runs.",
        )
    return paths


def select(
    predictions_paths: Sequence[Path],
    *,
    output: Path,
    max_size: int | None = None,
    dtype: Dtype = "bf16",
    mixing: Mixing = "uniform",
    labels_path: Path | None = None,
    top_k: int = 20,
    sizes: Mapping[str, int] | None = None,
    force: bool = False,
) -> SelectionRecord:
    """Choose members greedily and write the selection.

    The rule is WILLOW's (arXiv:1706.06905), under a limit: from the best single
    candidate that fits, add the candidate that gives the best GAP@k of the mean of all members'
    probabilities; each candidate at most once. One whose bytes do not fit in what is left of the
    limit is skipped. It ends when no addition raises the GAP. Of equal GAPs (nearer than 1e-12) the
    candidate with fewer bytes wins, then the first by name.

    The mean is uniform, or S3's, whose coefficients are ``GAP_i / sum_j GAP_j`` of the members' own
    GAPs; where all of them are 0 it is uniform too. Probabilities are summed in float64. In CSV
    files a class that a video does not list counts as 0; one that no member lists is not pooled.

    Args:
        predictions_paths: Candidates: predictions files of the kit, CSV files in the challenge's
            format, or both, of the same videos in any order.
        output: The ``selection.json`` to write.
        max_size: The most bytes that the members may take together; None means 1 GiB, and then,
            with no ``sizes`` either, a candidate of unknown size counts 0 bytes.
        dtype: The type that members will be fused in.
        mixing: ``uniform`` or ``gap``.
        labels_path: A CSV file of labels; None takes those in the predictions files.
        top_k: The k of GAP@k.
        sizes: Bytes by name, for candidates that no model of the kit made.
        force: Whether an existing file may be replaced.

    Returns:
        What was written.

    Raises:
        OutputError: ``output`` exists and ``force`` is False.
        CheckpointError: A predictions file of the kit is damaged.
        PredictionsError: A CSV file is damaged, or the videos are not the same.
        SelectionError: The candidates do not belong together; see ``read_candidates``.
        SizeLimitError: No candidate fits.
        ValueError: No predictions were named.
    """
    if not predictions_paths:
        raise ValueError("there are no predictions to select from")
    refuse_overwrite(output, force=force)
    known = read_candidates(
        predictions_paths,
        labels_path=labels_path,
        dtype=dtype,
        sizes=sizes or {},
        has_limit=max_size is not None or bool(sizes),
    )
    limit = GIB if max_size is None else max_size
    scorer = _Scorer(known, top_k)
    singles = {one.name: scorer.gap([one]) for one in known.candidates}
    scorer.weights = _weights(mixing, known.candidates, singles, limit)
    steps = _choose(known.candidates, singles, scorer, limit)
    selection = _record(known, scorer, singles, steps, dtype, limit, mixing, output.parent)
    write_selection(output, selection, force=force)
    return selection


@dataclass(frozen=True)
class _Step:
    """The member added, and the GAP and the bytes of all members then."""

    added: Candidate
    gap: float
    num_bytes: int


class _Scorer:
    """The GAP@k of a mean of some candidates; the weighted sum, which ranks alike, is ranked.

    Attributes:
        weights: What each candidate's probabilities are multiplied by in the sum, by name.
    """

    def __init__(self, known: Candidates, k: int) -> None:
        self.is_positive = known.labels.dense(known.num_classes)
        self.num_positives = known.labels.classes.size
        self.k = k
        self.weights = {one.name: 1.0 for one in known.candidates}

    def gap(self, members: Sequence[Candidate], base: NDArray[np.float64] | None = None) -> float:
        """Return the GAP of some members; ``base`` is the weighted sum of all but the last."""
        if not members:
            return 0.0
        scores, hits = [], []
        num_videos, num_classes = self.is_positive.shape
        step = max(1, BLOCK_VALUES // num_classes)
        for start in range(0, num_videos, step):
            rows = slice(start, start + step)
            if base is None:
                total = np.zeros(self.is_positive[rows].shape)
                for member in members:
                    total += self.share(member, rows)
            else:
                total = base[rows] + self.share(members[-1], rows)
            is_listed = [one.is_listed[rows] for one in members if one.is_listed is not None]
            if len(is_listed) == len(members):
                total[~np.logical_or.reduce(is_listed)] = -np.inf
            block_scores, block_hits = top_hits(total, self.is_positive[rows], self.k)
            scores.append(block_scores)
            hits.append(block_hits)
        return pooled_average_precision(
            np.concatenate(scores), np.concatenate(hits), self.num_positives
        )

    def share(self, member: Candidate, rows: slice) -> NDArray[np.float64]:
        """Return what a member adds to the sum, for some videos."""
        return np.multiply(member.probabilities[rows], self.weights[member.name], dtype=np.float64)


def _weights(
    mixing: Mixing, candidates: Sequence[Candidate], singles: Mapping[str, float], limit: int
) -> dict[str, float]:
    """Return what the probabilities of each candidate are multiplied by, before any division."""
    has_hits = any(singles[one.name] > 0 for one in candidates if one.num_bytes <= limit)
    if mixing == "gap" and has_hits:  # then the first member has, so that no sum of them is 0
        return dict(singles)
    return dict.fromkeys(singles, 1.0)


def _choose(
    candidates: Sequence[Candidate], singles: Mapping[str, float], scorer: _Scorer, limit: int
) -> list[_Step]:
    """Return the steps of the greedy rule, at least one.

    Raises:
        SizeLimitError: No candidate fits.
    """
    steps: list[_Step] = []
    members: list[Candidate] = []
    base = np.zeros(scorer.is_positive.shape)
    used, best = 0, -np.inf
    while True:
        fitting = [
            one for one in candidates if one not in members and one.num_bytes <= limit - used
        ]
        gaps = [
            scorer.gap([*members, one], base) if members else singles[one.name] for one in fitting
        ]
        highest = max(gaps, default=-np.inf)
        if highest <= best + ROUNDING:
            break
        added, best = min(
            (
                (one, gap)
                for one, gap in zip(fitting, gaps, strict=True)
                if gap >= highest - ROUNDING
            ),
            key=lambda pair: (pair[0].num_bytes, pair[0].name),
        )
        members.append(added)
        base += scorer.share(added, slice(None))
        used += added.num_bytes
        steps.append(_Step(added, best, used))
    if not steps:
        smallest = min(candidates, key=lambda one: (one.num_bytes, one.name))
        raise SizeLimitError(
            f"No candidate fits in {format_size(limit)}: {smallest.name}, the smallest, takes "
            f"{format_size(smallest.num_bytes)}.",
            mend="Raise --max-size, or train a smaller sub-model.",
        )
    return steps


def _record(
    known: Candidates,
    scorer: _Scorer,
    singles: Mapping[str, float],
    steps: Sequence[_Step],
    dtype: Dtype,
    limit: int,
    mixing: Mixing,
    folder: Path,
) -> SelectionRecord:
    members = [step.added for step in steps]
    weights = [scorer.weights[member.name] for member in members]
    return SelectionRecord(
        kit_version=ensemble_kit.__version__,
        k=scorer.k,
        dtype=dtype,
        max_size=limit,
        mixing=mixing,
        rule=RULE.format(mean=MEANS[mixing]),
        dataset_sha256=dataset_sha256(known.ids, known.labels),
        vocabulary_sha256=known.vocabulary_sha256,
        videos=len(known.ids),
        positives=known.labels.classes.size,
        gap=steps[-1].gap,
        bytes=steps[-1].num_bytes,
        members=tuple(
            SelectedRecord(
                name=member.name,
                coefficient=weight / sum(weights),
                bytes=member.num_bytes,
                gap=singles[member.name],
                gap_without=scorer.gap([one for one in members if one is not member]),
                predictions=_file_record(member, folder),
                model=_model_record(member, folder),
            )
            for member, weight in zip(members, weights, strict=True)
        ),
        path=tuple(
            StepRecord(added=step.added.name, gap=step.gap, bytes=step.num_bytes) for step in steps
        ),
        candidates=_candidate_records(
            known.candidates, singles, steps[-1].num_bytes, members, limit
        ),
    )


def _candidate_records(
    candidates: Sequence[Candidate],
    singles: Mapping[str, float],
    used: int,
    members: Sequence[Candidate],
    limit: int,
) -> tuple[CandidateRecord, ...]:
    left = limit - used
    records = []
    for one in sorted(candidates, key=lambda one: (-singles[one.name], one.num_bytes, one.name)):
        skipped = "It does not raise the GAP."
        if one.num_bytes > left:
            skipped = (
                f"Its {format_size(one.num_bytes)} do not fit in the {format_size(left)} left."
            )
        records.append(
            CandidateRecord(
                name=one.name,
                gap=singles[one.name],
                bytes=one.num_bytes,
                skipped=None if one in members else skipped,
            )
        )
    return tuple(records)


def _file_record(member: Candidate, folder: Path) -> FileRecord:
    path = member.predictions.path
    return FileRecord(path=Path(relpath(path, folder)).as_posix(), sha256=sha256_of(path))


def _model_record(member: Candidate, folder: Path) -> ModelRecord | None:
    """Return the record of a member's model with its path relative to another folder."""
    record = member.predictions.record
    if record is None or record.model is None:
        return None
    path = member.predictions.path.parent / record.model.file.path
    file = record.model.file.model_copy(update={"path": Path(relpath(path, folder)).as_posix()})
    return record.model.model_copy(update={"file": file})
