"""The predictions of all folds of a recipe as one file: out-of-fold predictions.

Each fold's videos are predicted by the model that was trained without them, so that a choice among
candidates can be made on all videos of a small data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import isfile
from pathlib import Path

import numpy as np

from ensemble_kit.choices import AnyPath
from ensemble_kit.data.folds import Fold
from ensemble_kit.errors import PredictionsError, shown
from ensemble_kit.files import refuse_overwrite, require_suffix
from ensemble_kit.predictions.file import Predictions, read_predictions
from ensemble_kit.predictions.folder import differing
from ensemble_kit.predictions.merging import write_joined
from ensemble_kit.predictions.rows import JoinedRows
from ensemble_kit.predictions.videos import dataset_sha256, joined
from ensemble_kit.store.provenance import (
    CheckpointMetadata,
    FoldsMetadata,
    ModelMetadata,
    PredictionsMetadata,
    schema_sha256,
)
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.workspace import fold_run_name

TRAIN = "Name the validation.safetensors of each run that `ensemble-kit train --fold` has trained."


def merge_folds(paths: Sequence[AnyPath], output: AnyPath, *, force: bool = False) -> Path:
    """Write the predictions of all folds as one file; each fold predicts its own videos.

    The file is a candidate for selection on the videos of all folds. No single model made it: what
    ``select`` chooses by it, ``fuse`` takes from a run that was trained on all of them.

    Args:
        paths: The validation predictions of the runs of all folds, in any order.
        output: A ``.safetensors`` file.
        force: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        CheckpointError: A file is damaged.
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        PredictionsError: A fold is missing or comes twice, a file holds a video that is not in its
            fold, or the folds are not of one recipe, schema and set of records.
    """
    output = Path(output)
    require_suffix(output, ".safetensors")
    refuse_overwrite(output, force=force)
    folds = sorted((_FoldFile.read(Path(path)) for path in paths), key=lambda each: each.number)
    _refuse_missing(folds)
    for other in folds[1:]:
        _refuse_difference(other, folds[0])
    write_joined(_joined(folds, output), output, force=force)
    return output


@dataclass(frozen=True)
class _FoldFile:
    """The predictions of one fold, and what is known of them.

    Attributes:
        fold: The fold.
        predictions: The predictions.
        metadata: What their file says of itself.
        model: The model that made them.
        checkpoint: What the model's file says of itself.
    """

    fold: Fold
    predictions: Predictions
    metadata: PredictionsMetadata
    model: ModelMetadata
    checkpoint: CheckpointMetadata

    @classmethod
    def read(cls, path: Path) -> "_FoldFile":
        predictions = read_predictions(path)
        metadata = predictions.metadata
        model = metadata.model if metadata else None
        if metadata is None or model is None or model.kind != "checkpoint":
            raise PredictionsError(f"{path} was not predicted by a checkpoint.", hint=TRAIN)
        checkpoint = _checkpoint_of(predictions, model)
        if checkpoint.fold is None:
            raise PredictionsError(
                f"{path} was predicted by a run that holds out no fold.", hint=TRAIN
            )
        fold = Fold.parse(checkpoint.fold)
        stranger = next((video for video in predictions.ids if not fold.holds(video)), None)
        if stranger is not None:
            raise PredictionsError(
                f"{path}: video {shown(stranger)} is not in fold {fold}, which its model has not "
                "seen.",
                hint=TRAIN,
            )
        return cls(fold, predictions, metadata, model, checkpoint)

    @property
    def number(self) -> int:
        return self.fold.number

    @property
    def name(self) -> str:
        """The name of the run without that of the fold."""
        return self.metadata.name.removesuffix(fold_run_name("", self.fold))


def _checkpoint_of(predictions: Predictions, model: ModelMetadata) -> CheckpointMetadata:
    """Return what the checkpoint that made some predictions says of itself."""
    path = predictions.home / model.file.path
    if not isfile(path):
        raise PredictionsError(
            f"{path}, which predicted {predictions.path}, does not exist.",
            hint="Put it back, or train the fold again.",
        )
    with open_tensors(path) as file:
        if file.sha256() != model.file.sha256:
            raise PredictionsError(
                f"{path} has changed since it predicted {predictions.path}.",
                hint="Predict the fold again.",
            )
        return file.metadata_as(CheckpointMetadata)


def _refuse_missing(folds: Sequence[_FoldFile]) -> None:
    """Raise unless there is one file of each fold."""
    of = folds[0].fold.of
    for each, following in pairwise(folds):
        if each.fold == following.fold:
            raise PredictionsError(
                f"{each.predictions.path} and {following.predictions.path} both hold predictions "
                f"of fold {each.fold}.",
                hint="Name one file of each fold.",
            )
    numbers = [each.number for each in folds if each.fold.of == of]
    missing = sorted(set(range(1, of + 1)).difference(numbers))
    if missing:
        raise PredictionsError(
            f"There is no file of fold {missing[0]}/{of}.",
            hint=f"Train it with `ensemble-kit train --fold {missing[0]}/{of}`, and name its "
            "predictions too.",
        )


def _refuse_difference(fold: _FoldFile, other: _FoldFile) -> None:
    """Raise if two folds do not belong together."""
    ours, theirs = fold.checkpoint, other.checkpoint
    difference = differing(
        (
            ("of another number of folds", fold.fold.of, other.fold.of),
            ("of a run with another name", fold.name, other.name),
            ("of another recipe", ours.recipe, theirs.recipe),
            ("of records of another schema", ours.data_schema, theirs.data_schema),
            ("of other training records", ours.training_files, theirs.training_files),
            ("of another precision", fold.model.dtype, other.model.dtype),
            ("of other repeats", fold.model.repeats, other.model.repeats),
            ("of another --top-k", fold.metadata.top_k, other.metadata.top_k),
        )
    )
    if difference is not None:
        raise PredictionsError(
            f"{fold.predictions.path} is {difference} than {other.predictions.path}.",
            hint="Merge the folds of one recipe, trained with the same options.",
        )


def _joined(folds: Sequence[_FoldFile], output: Path) -> Predictions:
    """Return the predictions of all folds, as those of the file that they will be in."""
    first = folds[0]
    parts = [fold.predictions for fold in folds]
    models = [fold.model.at(fold.predictions.home, output.parent) for fold in folds]
    model = models[0].model_copy(
        update={
            "kind": "folds",
            "folds": FoldsMetadata(
                checkpoints=tuple(each.file for each in models),
                recipe=first.checkpoint.recipe,
                schema_sha256=schema_sha256(first.checkpoint.data_schema),
            ),
        }
    )
    ids = tuple(video for part in parts for video in part.ids)
    labels = joined([part.labels for part in parts if part.labels is not None])
    update = {"name": first.name, "model": model, "dataset_sha256": dataset_sha256(ids, labels)}
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    return Predictions(
        output,
        first.name,
        ids,
        first.predictions.num_classes,
        JoinedRows(tuple(part.source for part in parts), starts),
        first.predictions.label_names,
        labels,
        first.metadata.model_copy(update=update),
    )
