"""Candidates for a selection: predictions of the same videos, each with its size in bytes."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import SelectionError
from ensemble_kit.predictions import Predictions, aligned, read_labels_csv, read_predictions, taken
from ensemble_kit.provenance import BYTES_PER_VALUE, Dtype


@dataclass(frozen=True, eq=False)
class Candidate:
    """Predictions that may become a member.

    Attributes:
        predictions: The file they are read from.
        num_bytes: What the member would take in a fused file; 0 where nobody told.
        places: ``(N,)``, where in its file each video is, in the order of the first candidate.
    """

    predictions: Predictions
    num_bytes: int
    places: NDArray[np.int64]

    @property
    def name(self) -> str:
        """What it is called in the selection."""
        return self.predictions.name

    def taken(self, videos: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the probabilities of some videos, ``(n, C)``; ``-inf`` where not listed."""
        return self.predictions.taken(self.places[videos])


@dataclass(frozen=True)
class Candidates:
    """All candidates of a selection, and what they are measured on.

    Attributes:
        candidates: In the order in which they were named.
        ids: The N videos.
        labels: Their labels.
        num_classes: C.
        vocabulary_sha256: The hash of the class names; None where all candidates are CSV files.
    """

    candidates: tuple[Candidate, ...]
    ids: tuple[str, ...]
    labels: LabelLists
    num_classes: int
    vocabulary_sha256: str | None


def read_candidates(
    paths: Sequence[Path],
    *,
    labels_path: Path | None,
    dtype: Dtype,
    sizes: Mapping[str, int],
    has_limit: bool,
    exclude: Sequence[str] = (),
) -> Candidates:
    """Read predictions of the same videos, in any order of videos.

    Args:
        paths: Predictions files of the kit, CSV files in the challenge's format, or both.
        labels_path: A CSV file of labels for the same videos; None takes those in the predictions
            files.
        dtype: The type that a member's numbers will be stored in.
        sizes: Bytes of candidates by name, for those that no model of the kit made.
        has_limit: Whether the size of every candidate must be known; else an unknown one is 0.
        exclude: Names of those to leave out.

    Raises:
        CheckpointError: A predictions file of the kit is damaged.
        PredictionsError: A CSV file is damaged, or the videos are not the same.
        SelectionError: Two candidates share a name, their classes or labels are not the same,
            there are no labels, or a size is not known.
    """
    opened = [read_predictions(path) for path in paths]
    _refuse_names(opened)
    names = [one.name for one in opened]
    refuse_unknown(list(sizes), names, "A size is given for")
    refuse_unknown(exclude, names, "To be left out is")
    opened = [one for one in opened if one.name not in exclude]
    if not opened:
        raise SelectionError(
            "All candidates are left out.", mend="Name fewer of them with --exclude."
        )
    num_bytes = [_num_bytes(one, dtype, sizes, has_limit=has_limit) for one in opened]
    own = next((one for one in opened if not one.is_sparse), None)
    for one in opened:
        _refuse_classes(one, own)
    first = opened[0]
    places = [aligned(one.ids, one.path, to=first.ids, of=first.path) for one in opened]
    if labels_path is not None:
        ids, lists = read_labels_csv(labels_path, num_classes=own.num_classes if own else None)
        labels = taken(lists, aligned(ids, labels_path, to=first.ids, of=first.path))
    else:
        labels = _common_labels(opened, places)
    if not labels.classes.size:
        raise SelectionError(
            f"{labels_path or first.path} holds no labels.",
            mend="Name a CSV file of the videos' labels with --labels.",
        )
    num_classes = max(*(one.num_classes for one in opened), int(labels.classes.max()) + 1)
    candidates = (
        Candidate(replace(one, num_classes=num_classes), size, place)
        for one, size, place in zip(opened, num_bytes, places, strict=True)
    )
    vocabulary = own.record.vocabulary_sha256 if own and own.record else None
    return Candidates(tuple(candidates), first.ids, labels, num_classes, vocabulary)


def refuse_unknown(wanted: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raise unless every wanted name is that of a candidate.

    Args:
        wanted: The names.
        names: Those of the candidates.
        what: The message's words before a name that is not among them.

    Raises:
        SelectionError: One is not.
    """
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise SelectionError(
                f"{what} {name!r}, which is not a candidate.",
                mend=f"Name one of {', '.join(near or names)}.",
            )


def _refuse_names(opened: Sequence[Predictions]) -> None:
    paths: dict[str, Path] = {}
    for one in opened:
        if one.name in paths:
            raise SelectionError(
                f"{paths[one.name]} and {one.path} are both named {one.name!r}.",
                mend="Leave one out, or rename one: a CSV file, or a run with `train --name`.",
            )
        paths[one.name] = one.path


def _num_bytes(
    predictions: Predictions, dtype: Dtype, sizes: Mapping[str, int], *, has_limit: bool
) -> int:
    name = predictions.name
    if name in sizes:
        return sizes[name]
    model = predictions.record.model if predictions.record else None
    if model is not None:
        return model.num_values * BYTES_PER_VALUE[dtype]
    if has_limit:
        raise SelectionError(
            f"The size of {name} is not known: {predictions.path} tells of no model.",
            mend=f"Give the size of every such candidate: --size {name}=4MB.",
        )
    return 0


def _refuse_classes(one: Predictions, own: Predictions | None) -> None:
    if own is None:
        return
    mend = "Select among predictions of one label vocabulary."
    if one.is_sparse and one.num_classes > own.num_classes:
        raise SelectionError(
            f"{one.path} lists class {one.num_classes - 1}; {own.path} has {own.num_classes} "
            "classes.",
            mend=mend,
        )
    if not one.is_sparse and one.label_names != own.label_names:
        raise SelectionError(f"{one.path} has other label names than {own.path}.", mend=mend)


def _common_labels(
    opened: Sequence[Predictions], places: Sequence[NDArray[np.int64]]
) -> LabelLists:
    """Return the labels that every file with labels agrees on, in the first candidate's order."""
    found: tuple[Predictions, LabelLists] | None = None
    for one, place in zip(opened, places, strict=True):
        if one.labels is None:
            continue
        labels = taken(one.labels, place)
        if found is None:
            found = one, labels
        elif not all(map(np.array_equal, found[1], labels)):
            raise SelectionError(
                f"{one.path} has other labels than {found[0].path}.",
                mend="Predict every candidate on the same records, or name the labels with "
                "--labels.",
            )
    return found[1] if found else LabelLists.from_lists([])
