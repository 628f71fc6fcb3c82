"""Candidates for a selection: predictions of the same videos, each in a precision of some bytes."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import Dtype
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError, SelectionError
from ensemble_kit.files import sha256_of
from ensemble_kit.predictions.challenge_csv import read_labels_csv
from ensemble_kit.predictions.columns import common_columns
from ensemble_kit.predictions.file import Predictions, read_predictions
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.predictions.videos import aligned, dataset_sha256, taken
from ensemble_kit.store.dtypes import finest_first
from ensemble_kit.store.provenance import ModelMetadata

NOT_THE_SAME = (
    "Predict all candidates on the same records, or take --intersect to leave out videos."
)


@dataclass(frozen=True, eq=False)
class Candidate:
    """Predictions that may become a member.

    Attributes:
        predictions: The file that they are read from.
        dtype: The precision that the member would be stored in; None where no model of the kit,
            or none that can be fused, made the predictions.
        num_bytes: What the member would take in a fused file; 0 where that is not known.
        places: ``(N,)``, where in its file each video is, in the order of the first candidate.
    """

    predictions: Predictions
    dtype: Dtype | None
    num_bytes: int
    places: NDArray[np.int64]

    @property
    def name(self) -> str:
        """The member's name in the selection, the same in each precision."""
        return self.predictions.name

    def taken(self, videos: NDArray[np.int64]) -> Floats:
        """Return the probabilities of some videos, ``(n, C)``; ``-inf`` where not listed."""
        return self.predictions.taken(self.places[videos])


@dataclass(frozen=True)
class Candidates:
    """All candidates of a selection, and what they are measured on.

    Attributes:
        candidates: In the order in which they were named, then of their precisions.
        ids: The N videos.
        labels: Their labels, as columns.
        classes: ``(C,)``, ascending: the class of each column.
        dataset_sha256: The hash of the videos and their labels, see ``videos.dataset_sha256``.
        vocabulary_sha256: The hash of the class names; None where no file of the kit is among them.
        num_left_out: Videos that some file lacks.
        shared_bytes: What a fused file takes once for all of its members.
    """

    candidates: tuple[Candidate, ...]
    ids: tuple[str, ...]
    labels: LabelLists
    classes: NDArray[np.int64]
    dataset_sha256: str
    vocabulary_sha256: str | None
    num_left_out: int = 0
    shared_bytes: int = 0

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    @property
    def has_gaps(self) -> bool:
        """Whether there are classes without a column, as no file and no label names them."""
        return bool(self.num_classes <= self.classes[-1])

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The precisions that candidates stand in, finest first."""
        return finest_first(candidate.dtype for candidate in self.candidates)


def read_candidates(
    paths: Sequence[Path],
    *,
    labels_path: Path | None,
    dtypes: Sequence[Dtype],
    sizes: Mapping[str, int],
    has_limit: bool,
    needs_all: bool = True,
    exclude: Sequence[str] = (),
    intersect: bool = False,
) -> Candidates:
    """Open predictions of the same videos, in any order of videos.

    Predictions stand in each precision that they measure, see ``ModelMetadata.measures``; where
    some were measured in fp16 or bf16 itself, those as trained do not stand in it.

    Args:
        paths: Predictions files of the kit, of NumPy, or CSV files in the challenge's format.
        labels_path: A CSV file of labels for the same videos; None takes those in the predictions
            files.
        dtypes: The precisions that candidates may stand in.
        sizes: Bytes of candidates by name, for those that no model of the kit made.
        has_limit: Whether the size of every candidate must be known; else an unknown size is 0.
        needs_all: Whether each must stand in all of these precisions.
        exclude: Names of the candidates to leave out.
        intersect: Whether videos that some file lacks are left out.

    Raises:
        CheckpointError: A predictions file of the kit is damaged.
        PredictionsError: Another file is damaged, or the videos are not the same.
        SelectionError: Two candidates share a name, their classes or labels are not the same,
            there are no labels, a size is not known, a model has changed since it predicted, or a
            member's predictions were not measured in a precision.
    """
    opened = _open(paths, sizes, exclude)
    standing = _standing(opened, dtypes)
    if needs_all:
        _refuse_unmeasured(opened, standing, dtypes)
    num_known = refuse_other_classes(opened)
    _refuse_changed_models(opened)
    ids, places, labels = _labelled(opened, labels_path, num_known, intersect=intersect)
    columns = common_columns(opened, labels)
    candidates = []
    for predictions, stands_in, place in zip(columns.opened, standing, places, strict=True):
        for dtype in stands_in:
            size = _num_bytes(predictions, dtype, sizes, has_limit=has_limit)
            candidates.append(Candidate(predictions, dtype, size, place))
    models = (each.metadata.model for each in opened if each.metadata)
    vocabularies = (each.metadata.vocabulary_sha256 for each in opened if each.metadata)
    num_all = len(set().union(*(predictions.ids for predictions in opened)))
    return Candidates(
        tuple(candidates),
        ids,
        columns.labels,
        columns.classes,
        dataset_sha256(ids, labels),
        next(vocabularies, None),
        num_all - len(ids),
        max((model.shared_bytes for model in models if model), default=0),
    )


def _open(
    paths: Sequence[Path], sizes: Mapping[str, int], exclude: Sequence[str]
) -> list[Predictions]:
    """Open predictions, without those that are left out."""
    opened: list[Predictions] = []
    for path in paths:
        opened.append(_sharing(read_predictions(path), opened[0] if opened else None))
    _refuse_names(opened)
    names = list(dict.fromkeys(predictions.name for predictions in opened))
    refuse_unknown(list(sizes), names, "A size is given for {}")
    refuse_unknown(exclude, names, "{} is to be left out")
    opened = [predictions for predictions in opened if predictions.name not in exclude]
    if not opened:
        raise SelectionError(
            "All candidates are left out.", hint="Name fewer of them with --exclude."
        )
    return opened


def _labelled(
    opened: Sequence[Predictions],
    labels_path: Path | None,
    num_classes: int | None,
    *,
    intersect: bool,
) -> tuple[tuple[str, ...], list[NDArray[np.int64]], LabelLists]:
    """Return the videos' ids, their places in each file, and their labels."""
    sources = [(predictions.ids, predictions.path) for predictions in opened]
    if labels_path is None:
        ids, places = _aligned(sources, intersect=intersect)
        labels = common_labels(opened, places)
    else:
        labelled, lists = read_labels_csv(labels_path, num_classes=num_classes)
        sources.append((labelled, labels_path))
        ids, places = _aligned(sources, intersect=intersect)
        labels = taken(lists, places.pop())
    if not labels.classes.size:
        raise SelectionError(
            f"{labels_path or opened[0].path} holds no labels.",
            hint="Name a CSV file of the videos' labels with --labels.",
        )
    return ids, places, labels


def _sharing(predictions: Predictions, first: Predictions | None) -> Predictions:
    """Return predictions that share the ids and labels of the first file where they are the same.

    A hundred bytes for each video of each file would be more than what a search keeps.
    """
    if first is None or predictions.ids != first.ids:
        return predictions
    labels = predictions.labels
    if labels and first.labels and all(map(np.array_equal, labels, first.labels)):
        labels = first.labels
    return replace(predictions, ids=first.ids, labels=labels)


def _standing(opened: Sequence[Predictions], dtypes: Sequence[Dtype]) -> list[list[Dtype | None]]:
    """Return the precisions that each file's predictions stand in; None of no kit's model."""
    exact = {(each.name, model.dtype) for each in opened if (model := _fusible(each))}
    standing: list[list[Dtype | None]] = []
    for predictions in opened:
        model = _fusible(predictions)
        if model is None:
            standing.append([None])
            continue
        standing.append(
            [
                dtype
                for dtype in dtypes
                if model.measures(dtype)
                and (dtype == model.dtype or (predictions.name, dtype) not in exact)
            ]
        )
    return standing


def _refuse_unmeasured(
    opened: Sequence[Predictions],
    standing: Sequence[Sequence[Dtype | None]],
    dtypes: Sequence[Dtype],
) -> None:
    """Raise if a member was not measured in some precision, or only in others."""
    by_name: dict[str, set[Dtype | None]] = {}
    for predictions, stands_in in zip(opened, standing, strict=True):
        by_name.setdefault(predictions.name, set()).update(stands_in)
    for predictions in opened:
        model = _fusible(predictions)
        if model is None:
            continue
        measured = model.dtype or "the precision of its checkpoint"
        missing = [dtype for dtype in dtypes if dtype not in by_name[predictions.name]]
        if missing:
            path = predictions.home / model.file.path
            raise SelectionError(
                f"{predictions.name} is to be selected in {missing[0]}, but {predictions.path} was "
                f"measured in {measured}.",
                hint=f"Measure it with `ensemble-kit predict --dtype {missing[0]} {path} DATA -o "
                "FILE`, and name that file too."
                if model.folds is None
                else f"Train its folds with --predict-dtype {missing[0]}, and merge what they "
                "predict in it too.",
            )
        if not any(map(model.measures, dtypes)):
            raise SelectionError(
                f"{predictions.path} was measured in {measured}, which is none of "
                f"{', '.join(dtypes)}.",
                hint="Leave it out, or name its precision with --dtype.",
            )


def _aligned(
    sources: Sequence[tuple[Sequence[str], Path]], *, intersect: bool
) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """Return the videos, in the first file's order, and where in each file they are.

    Args:
        sources: The ids and the path of each file.
        intersect: Whether videos that are not in all of them are left out; else they are refused.

    Raises:
        PredictionsError: A file lacks a video of another, or no video is in all of them.
    """
    first, path = sources[0]
    if not intersect:
        own = np.arange(len(first))  # one array for all files in the same order
        return tuple(first), [
            own if ids is first else aligned(ids, other, to=first, of=path, hint=NOT_THE_SAME)
            for ids, other in sources
        ]
    common = set(first).intersection(*(ids for ids, _ in sources[1:]))
    if not common:
        raise PredictionsError(
            f"No video is in all of {', '.join(str(source) for _, source in sources)}.",
            hint="Predict every candidate on the same records.",
        )
    ids = tuple(video for video in first if video in common)
    places = []
    for ids_of_source, _ in sources:
        place = {video: index for index, video in enumerate(ids_of_source)}
        places.append(np.array([place[video] for video in ids], np.int64))
    return ids, places


def refuse_unknown(wanted: Sequence[str], names: Sequence[str], message: str) -> None:
    """Raise unless every wanted name is the name of a candidate.

    Args:
        wanted: The names that options gave.
        names: The candidates' names.
        message: What the error says first, with ``{}`` for the name that is unknown.

    Raises:
        SelectionError: A name is not among them.
    """
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise SelectionError(
                f"{message.format(repr(name))}, but there is no such candidate.",
                hint=f"Name one of {', '.join(near or names)}.",
            )


def _fusible(predictions: Predictions) -> ModelMetadata | None:
    """Return the model that made some predictions, if it can be fused."""
    model = predictions.metadata.model if predictions.metadata else None
    return model if model is not None and model.bytes_by_dtype is not None else None


def _refuse_names(opened: Sequence[Predictions]) -> None:
    """Raise unless files of one name are of one model, each in another precision."""
    firsts: dict[str, Predictions] = {}
    measured: dict[tuple[str, Dtype | None], Predictions] = {}
    for predictions in opened:
        name, model = predictions.name, _fusible(predictions)
        first = firsts.setdefault(name, predictions)
        other = measured.setdefault((name, model.dtype if model else None), predictions)
        if first is predictions:
            continue
        kin = _fusible(first)
        if model is None or kin is None or model.file.sha256 != kin.file.sha256:
            other = first
        if other is not predictions:
            raise SelectionError(
                f"{other.path} and {predictions.path} are both named {name!r}.",
                hint="Leave one out, or rename one: a CSV file, or a run with `train --name`.",
            )


def _num_bytes(
    predictions: Predictions, dtype: Dtype | None, sizes: Mapping[str, int], *, has_limit: bool
) -> int:
    name, model = predictions.name, _fusible(predictions)
    if name in sizes:
        return sizes[name]
    if model is not None and model.bytes_by_dtype is not None and dtype is not None:
        return model.bytes_by_dtype[dtype]
    if has_limit:
        raise SelectionError(
            f"The size of {name} is not known: {predictions.path} does not name a model of the "
            "kit.",
            hint=f"Give the size of every such candidate: --size {name}=4MB.",
        )
    return 0


def refuse_other_classes(
    opened: Sequence[Predictions],
    *,
    hint: str = "Select among predictions of one label vocabulary.",
) -> int | None:
    """Return the number of classes, None if no file says it, or raise if the files differ.

    Raises:
        SelectionError: They do, with ``hint`` as what to do.
    """
    certain = [predictions for predictions in opened if predictions.knows_classes]
    for predictions in opened if certain else []:
        num_classes = certain[0].num_classes
        if not predictions.knows_classes and predictions.num_classes > num_classes:
            raise SelectionError(
                f"{predictions.path} lists class {predictions.num_classes - 1}; "
                f"{certain[0].path} has {num_classes} classes.",
                hint=hint,
            )
    # a file that names the classes, if there is one, is what the others are compared with
    named = [predictions for predictions in certain if predictions.label_names is not None]
    for predictions in certain:
        first = (named or certain)[0]
        difference = predictions.vocabulary.difference(first.vocabulary)
        if difference is not None:
            others = f"other candidates, such as {first.path},"
            raise SelectionError(difference.between(str(predictions.path), others), hint=hint)
    return certain[0].num_classes if certain else None


def _refuse_changed_models(opened: Sequence[Predictions]) -> None:
    """Raise if a model has changed since it predicted; one that is gone is not compared."""
    for predictions in opened:
        model = predictions.metadata.model if predictions.metadata else None
        if model is None:
            continue
        for file in model.files:
            path = predictions.home / file.path
            if isfile(path) and sha256_of(path) != file.sha256:
                again = f"`ensemble-kit predict {path} DATA -o {predictions.path}`"
                raise SelectionError(
                    f"{path} has changed since it predicted {predictions.path}.",
                    hint=f"Predict again with {again}."
                    if model.folds is None
                    else "Merge the predictions of its folds again.",
                )


def common_labels(opened: Sequence[Predictions], places: Sequence[NDArray[np.int64]]) -> LabelLists:
    """Return the labels that every file with labels agrees on, in the first candidate's order.

    Args:
        opened: The files.
        places: For each file ``(N,)``, where in it each video is.

    Returns:
        The labels of N videos; of none where no file has labels.

    Raises:
        SelectionError: Two files have different labels.
    """
    first: tuple[Predictions, LabelLists] | None = None
    for predictions, place in zip(opened, places, strict=True):
        if predictions.labels is None:
            continue
        labels = taken(predictions.labels, place)
        if first is None:
            first = predictions, labels
        elif not all(map(np.array_equal, first[1], labels)):
            raise SelectionError(
                f"{predictions.path} has other labels than {first[0].path}.",
                hint="Predict every candidate on the same records, or name the labels with "
                "--labels.",
            )
    return first[1] if first else LabelLists.from_lists([])
