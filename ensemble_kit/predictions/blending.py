"""Other predictions of a selection's members, mixed by its coefficients.

A selection is made on validation videos. What is mixed here are the same candidates' predictions of
other videos, such as a challenge's test files; each belongs to the candidate whose name it has.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import TOP_K
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError
from ensemble_kit.files import refuse_overwrite
from ensemble_kit.predictions.candidates import common_labels, refuse_other_classes
from ensemble_kit.predictions.columns import Columns, common_columns
from ensemble_kit.predictions.file import BLOCK_VALUES, Predictions, read_predictions
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.predictions.videos import aligned
from ensemble_kit.predictions.writing import (
    PredictionsWriter,
    csv_written,
    predictions_written,
    require_suffix,
)
from ensemble_kit.progress import progress
from ensemble_kit.store.selection_file import SelectionMetadata, read_selection

SAME_VIDEOS = "Predict every member on the same records."


@dataclass(frozen=True)
class Blend:
    """Predictions that have been mixed.

    Attributes:
        path: The file.
        num_videos: How many videos it has.
        coefficients: The coefficient of each member, by name.
        unused: Candidates that were given and are no members, by name.
    """

    path: Path
    num_videos: int
    coefficients: dict[str, float]
    unused: tuple[str, ...]


def blend(
    selection_path: Path,
    sources: Sequence[tuple[str | None, Path]],
    output: Path,
    *,
    top_k: int | None = None,
    force: bool = False,
) -> Blend:
    """Mix predictions of a selection's members by its coefficients, some videos at a time.

    Sums are in float64, members in the selection's order. A class that a file does not list counts
    as 0; one that no member lists is not listed.

    Args:
        selection_path: The ``selection.json``.
        sources: Predictions of the same videos, in any order of videos: the candidate's name, or
            None for the name that the file has, and the file or folder.
        output: A ``.csv`` file in the challenge's format; or a ``.safetensors`` file, where every
            member's predictions hold every class and one of them names the classes. Its videos are
            in the order of the first member's.
        top_k: How many classes of each video to keep; None keeps all, and 20 in a ``.csv``.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        PredictionsError: A member has no predictions or two; a file is of no candidate; a video is
            in some files only; another model predicted than was selected; or ``output`` cannot
            hold what the files hold.
        SelectionError: The selection cannot be read, or the classes differ.
    """
    require_suffix(output)
    refuse_overwrite(output, force=force)
    selection = read_selection(selection_path)
    known = _by_candidate(selection_path, selection, sources)
    coefficients = {member.name: member.coefficient for member in selection.members}
    opened = [known[name] for name in coefficients]
    _refuse_other_models(selection_path.parent, selection, opened)
    refuse_other_classes(opened, hint="Predict with members of one label vocabulary.")
    first = opened[0]
    places = tuple(
        aligned(each.ids, each.path, to=first.ids, of=first.path, hint=SAME_VIDEOS)
        for each in opened
    )
    labels = common_labels(opened, places)
    if labels.num_videos != len(first.ids):
        labels = LabelLists.from_lists([[]] * len(first.ids))
    columns = common_columns(opened, labels)
    mixture = _Mixture(columns, tuple(coefficients.values()), places)
    is_csv = output.suffix.lower() == ".csv"
    with (
        _written(columns, output, is_csv=is_csv, top_k=top_k, force=force) as writer,
        progress("mix predictions", len(first.ids)) as shown,
    ):
        done = 0
        for ids, own, rows in mixture.blocks():
            writer.add(ids, own, rows)
            done += len(ids)
            shown.update(done, "videos")
    unused = tuple(name for name in known if name not in coefficients)
    return Blend(output, len(first.ids), coefficients, unused)


@dataclass(frozen=True, eq=False)
class _Mixture:
    """Predictions of the same videos, with a coefficient for each file.

    Attributes:
        columns: The files, and their labels where they have any.
        coefficients: Their coefficients.
        places: For each file ``(N,)``, where in it each video of the first file is.
    """

    columns: Columns
    coefficients: tuple[float, ...]
    places: tuple[NDArray[np.int64], ...]

    def blocks(self) -> Iterator[tuple[Sequence[str], LabelLists, Floats]]:
        """Yield ids, labels and mixed rows ``(n, C)``, float64, some videos at a time."""
        (first, *_), labels, classes = self.columns
        ids = first.ids
        step = max(1, BLOCK_VALUES // len(classes))
        for start in range(0, len(ids), step):
            stop = min(start + step, len(ids))
            yield ids[start:stop], labels.rows(start, stop), self._rows(slice(start, stop))

    def _rows(self, videos: slice) -> Floats:
        total, is_listed = np.zeros(()), np.zeros((), np.bool_)
        for predictions, coefficient, places in zip(
            self.columns.opened, self.coefficients, self.places, strict=True
        ):
            rows = predictions.taken(places[videos])
            total = total + coefficient * np.maximum(rows, 0, dtype=np.float64)
            is_listed = is_listed | (rows > -np.inf)
        return np.where(is_listed, total, -np.inf)


def _by_candidate(
    selection_path: Path, selection: SelectionMetadata, sources: Sequence[tuple[str | None, Path]]
) -> Mapping[str, Predictions]:
    """Return the predictions of each candidate, by its name; no member lacks them."""
    names = [candidate.name for candidate in selection.candidates]
    known: dict[str, Predictions] = {}
    for given, path in sources:
        predictions = read_predictions(path)
        name = given or predictions.name
        if name not in names:
            raise PredictionsError(
                f"{path} holds predictions of {name!r}, which is no candidate of {selection_path}.",
                hint=f"Give it the name of one of {', '.join(names)}, or say whose it is: "
                f"{names[0]}={path}.",
            )
        if name in known:
            raise PredictionsError(
                f"{known[name].path} and {path} both hold predictions of {name!r}.",
                hint="Leave one out.",
            )
        known[name] = predictions
    for member in selection.members:
        if member.name not in known:
            raise PredictionsError(
                f"{member.name!r} is a member of {selection_path}, and no predictions of it are "
                "named.",
                hint=f"Name those of every member; for a file of another name: {member.name}=FILE.",
            )
    return known


def _refuse_other_models(
    folder: Path, selection: SelectionMetadata, opened: Sequence[Predictions]
) -> None:
    """Raise if a member's predictions are known to be of another model than was selected."""
    for member, predictions in zip(selection.members, opened, strict=True):
        model = predictions.metadata.model if predictions.metadata else None
        selected = member.model
        if selected is None or selected.folds is not None:  # the final member is another model
            continue
        if model and model.file.sha256 != selected.file.sha256:
            raise PredictionsError(
                f"{predictions.path} was predicted by another model than the member "
                f"{member.name!r} that was selected.",
                hint=f"Predict again with {folder / selected.file.path}, or select again.",
            )


def _written(
    columns: Columns, output: Path, *, is_csv: bool, top_k: int | None, force: bool
) -> AbstractContextManager[PredictionsWriter]:
    if is_csv:
        return csv_written(output, top_k=top_k or TOP_K, classes=columns.classes, force=force)
    opened = columns.opened
    sparse = next((each.path for each in opened if each.is_sparse), None)
    label_names = next((each.label_names for each in opened if each.label_names), None)
    if sparse is not None or label_names is None:
        problem = (
            f"{sparse} lists only some classes of each video"
            if sparse is not None
            else f"{opened[0].path} does not name its classes"
        )
        raise PredictionsError(
            f"{problem}, so {output} cannot hold the mixture.",
            hint="Name a .csv file as the output.",
        )
    return predictions_written(
        output, label_names=label_names, name=output.stem, model=None, top_k=top_k, force=force
    )
