"""What the predictions say beyond the selection: which candidates agree, which classes change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.errors import SelectionError
from ensemble_kit.files import sha256_of
from ensemble_kit.metrics import MetricsAccumulator, top_classes
from ensemble_kit.predictions.candidates import Candidates, read_candidates
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.progress import progress
from ensemble_kit.store.provenance import FileMetadata
from ensemble_kit.store.selection_file import CandidateMetadata, SelectionMetadata

READ_VALUES = 2**20  # probabilities of a candidate read together: 4 MiB
FEWEST_POSITIVES = 20  # a class with fewer is not compared: there chance decides
MOST_CHANGES = 12  # so many classes that gain are shown, and as many that lose


@dataclass(frozen=True)
class ClassChange:
    """What the ensemble does to one class.

    Attributes:
        name: The class.
        positives: How many videos have it as a label.
        single: Its average precision by the best single candidate.
        ensemble: Its average precision by the ensemble.
    """

    name: str
    positives: int
    single: float
    ensemble: float

    @property
    def change(self) -> float:
        """What the ensemble gains over the single candidate."""
        return self.ensemble - self.single


@dataclass(frozen=True)
class Agreement:
    """How alike M candidates are.

    Attributes:
        names: The candidates' names.
        shares: ``(M, M)``; of the best classes of each video, as many as it has labels, the share
            that two candidates both name.
    """

    names: tuple[str, ...]
    shares: NDArray[np.float64]

    @property
    def lowest(self) -> float:
        """The share of the two candidates that are least alike."""
        return float(self.shares.min())

    @property
    def highest(self) -> float:
        """The share of the two candidates that are most alike."""
        return float(self.shares[~np.eye(len(self.names), dtype=bool)].max())

    @property
    def strengths(self) -> NDArray[np.float64]:
        """``(M, M)``, how a share is coloured: 0 the lowest, 1 the highest of two candidates."""
        spread = max(self.highest - self.lowest, 1e-9)
        return np.clip((self.shares - self.lowest) / spread, 0, 1)


@dataclass(frozen=True)
class Evidence:
    """What the candidates' predictions show, as far as they could be read.

    Attributes:
        agreement: None where fewer than two candidates' predictions could be read.
        changes: The classes that gain most, then those that lose most; None where the predictions
            of some member or of the best candidate could not be read.
        classes: Every class that some video has as a label, the most frequent first; None as for
            ``changes``.
        missing: A sentence for each file that could not be read, by the candidate's label.
        num_videos: How many videos agreement and changes were measured on.
    """

    agreement: Agreement | None
    changes: tuple[ClassChange, ...] | None
    missing: dict[str, str]
    num_videos: int = 0
    classes: tuple[ClassChange, ...] | None = None


def gather(
    selection: SelectionMetadata, folder: Path, *, read_values: int = READ_VALUES
) -> Evidence:
    """Read the predictions that a selection was made from, as far as they are unchanged.

    Args:
        selection: The selection.
        folder: The folder of its file, to which its paths are relative.
        read_values: About how many probabilities of a candidate to read together.

    Raises:
        CheckpointError: A predictions file is damaged.
        PredictionsError: Another tool's predictions file is damaged.
    """
    missing = {
        selection.label(candidate.name, candidate.dtype): problem
        for candidate in selection.candidates
        if (problem := _problem(candidate.predictions, folder)) is not None
    }
    labels = selection.labels
    if labels is not None and (problem := _problem(labels, folder)) is not None:
        missing["labels"] = problem
        return Evidence(None, None, missing)
    present = [
        candidate
        for candidate in selection.candidates
        if selection.label(candidate.name, candidate.dtype) not in missing
    ]
    if not present:
        return Evidence(None, None, missing)
    try:
        known = read_candidates(
            list(dict.fromkeys(folder / candidate.predictions.path for candidate in present)),
            labels_path=folder / selection.labels.path if selection.labels else None,
            dtypes=selection.dtypes,
            needs_all=False,
            sizes={},
            has_limit=False,
            intersect=selection.left_out > 0,
        )
    except SelectionError as error:  # a model has changed since it predicted
        return Evidence(None, None, {**missing, "candidates": error.problem})
    by_key = {(candidate.name, candidate.dtype): candidate for candidate in known.candidates}
    shown = tuple(by_key[candidate.name, candidate.dtype] for candidate in present)
    known = replace(known, candidates=shown)
    return _Reader(known, selection, present, read_values).evidence(missing)


def _problem(file: FileMetadata, folder: Path) -> str | None:
    path = folder / file.path
    if not exists(path):  # it may be a folder
        return f"{file.path} is not there."
    if sha256_of(path) != file.sha256:
        return f"{file.path} has changed since the selection was made."
    return None


class _Reader:
    """Reads all candidates once, some videos at a time."""

    def __init__(
        self,
        known: Candidates,
        selection: SelectionMetadata,
        present: Sequence[CandidateMetadata],
        read_values: int,
    ) -> None:
        self.known = known
        self.read_values = read_values
        self.names = tuple(selection.label(each.name, each.dtype) for each in present)
        self.coefficients = {
            selection.label(member.name, member.dtype): member.coefficient
            for member in selection.members
        }
        best = selection.label(selection.candidates[0].name, selection.candidates[0].dtype)
        self.single = self.names.index(best) if best in self.names else None
        self.can_compare = self.single is not None and self.coefficients.keys() <= set(self.names)
        self.overlaps = np.zeros((len(present), len(present)), np.int64)
        self.before, self.after = (
            MetricsAccumulator(num_classes=known.num_classes, k=selection.k) for _ in range(2)
        )

    def evidence(self, missing: dict[str, str]) -> Evidence:
        num_videos = len(self.known.ids)
        step = max(1, self.read_values // self.known.num_classes)
        with progress("report", num_videos) as shown:
            for start in range(0, num_videos, step):
                stop = min(start + step, num_videos)
                self._add(start, stop)
                shown.update(stop, "videos")
        agreement = None
        if len(self.names) > 1:
            named = np.maximum(np.diagonal(self.overlaps), 1)
            shares = self.overlaps / np.minimum(named[:, None], named)
            agreement = Agreement(self.names, shares)
        if not self.can_compare:
            return Evidence(agreement, None, missing, num_videos)
        classes = self._classes()
        return Evidence(agreement, _most_changed(classes), missing, num_videos, classes)

    def _add(self, start: int, stop: int) -> None:
        videos = np.arange(start, stop)
        labels = self.known.labels.rows(start, stop)
        num_labels = np.diff(labels.offsets)
        total = np.zeros((stop - start, self.known.num_classes))
        is_listed = np.zeros(total.shape, np.bool_)
        named = []
        candidates = zip(self.names, self.known.candidates, strict=True)
        for index, (name, candidate) in enumerate(candidates):
            rows = candidate.taken(videos)
            named.append(_named(rows, num_labels))
            if index == self.single and self.can_compare:
                self.before.add(rows, labels)
            if name in self.coefficients:
                is_listed |= rows > -np.inf
                total += np.multiply(np.maximum(rows, 0), self.coefficients[name], dtype=float)
        if self.can_compare:
            self.after.add(np.where(is_listed, total, -np.inf), labels)
        pairs, places = np.unique(np.concatenate(named), return_inverse=True)
        is_named = np.zeros((len(named), len(pairs)), np.float32)
        is_named[
            np.repeat(np.arange(len(named)), [len(pairs_of) for pairs_of in named]), places
        ] = 1
        self.overlaps += np.rint(is_named @ is_named.T).astype(np.int64)

    def _classes(self) -> tuple[ClassChange, ...]:
        before, positives = self.before.class_average_precisions()
        after, _ = self.after.class_average_precisions()
        names = next(
            (candidate.predictions.label_names for candidate in self.known.candidates
             if candidate.predictions.label_names is not None),
            tuple(f"class {index}" for index in self.known.classes),
        )  # fmt: skip
        return tuple(
            ClassChange(
                names[index], int(positives[index]), float(before[index]), float(after[index])
            )
            for index in np.argsort(-positives, kind="stable")
            if positives[index]
        )


def _most_changed(classes: Sequence[ClassChange]) -> tuple[ClassChange, ...]:
    """Return the classes that gain most, then those that lose most."""
    frequent = [each for each in classes if each.positives >= FEWEST_POSITIVES]
    gains = sorted((each for each in frequent if each.change > 0), key=lambda each: -each.change)
    losses = sorted((each for each in frequent if each.change < 0), key=lambda each: each.change)
    return (*gains[:MOST_CHANGES], *losses[:MOST_CHANGES])


def _named(rows: Floats, num_labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each video's best classes, as many as it has labels, as places in ``rows``."""
    classes, scores = top_classes(rows, max(1, int(num_labels.max(initial=0))))
    is_named = (np.arange(classes.shape[1]) < num_labels[:, None]) & (scores > -np.inf)
    places: NDArray[np.int64] = classes + np.arange(len(rows))[:, None] * rows.shape[1]
    return places[is_named]
