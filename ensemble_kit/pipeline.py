"""Stages in a row. Stages never import each other; this module may import them all."""

from dataclasses import dataclass
from pathlib import Path

from ensemble_kit.averaging import BatchNormRule, average_checkpoints
from ensemble_kit.checkpoints import open_tensors
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError
from ensemble_kit.evaluation import evaluate_predictions
from ensemble_kit.prediction import predict
from ensemble_kit.predictions import read_predictions
from ensemble_kit.provenance import CheckpointRecord
from ensemble_kit.recipes import Recipe, parse_recipe
from ensemble_kit.training import TrainedRun, train_checkpoints
from ensemble_kit.workspace import RunFolder


@dataclass(frozen=True)
class FinishedRun:
    """A trained run, and the validation GAP@20 of its averaged checkpoint where it has one."""

    trained: TrainedRun
    averaged_gap: float | None


def train(
    recipe: Recipe,
    *,
    training: Records,
    validation: Records | None,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
) -> FinishedRun:
    """Train a recipe, average its last checkpoints and predict the validation records.

    An interrupted run keeps its checkpoints and is neither averaged nor predicted. See
    ``train_checkpoints``, ``average_checkpoints`` and ``predict`` for arguments and faults.
    """
    trained = train_checkpoints(
        recipe,
        training=training,
        validation=validation,
        folder=folder,
        seed=seed,
        device=device,
        force=force,
    )
    if trained.is_stopped:
        return FinishedRun(trained, None)
    run = trained.folder
    average_run(run, run.averaged, training=training)
    if validation is None:
        return FinishedRun(trained, None)
    predict(run.averaged, validation, run.validation, device=device)
    metrics = evaluate_predictions(read_predictions(run.validation), None, k=20)
    return FinishedRun(trained, metrics.gap)


def average_run(
    run: RunFolder,
    output: Path,
    *,
    last: int | None = None,
    from_step: int = 0,
    batch_norm: BatchNormRule = "recalibrate",
    training: Records | None = None,
    force: bool = False,
) -> list[Path]:
    """Average a run's last checkpoints and return those that were averaged.

    Args:
        run: The run's folder.
        output: The file to write.
        last: How many; None takes the recipe's ``training.average_last``.
        from_step: Checkpoints of earlier steps are left out.
        batch_norm: See ``average_checkpoints``; so for ``training`` and ``force``.
        training: Records to re-estimate batch norm on.
        force: Whether an existing file may be replaced.

    Raises:
        CheckpointError: There are no such checkpoints, or they cannot be averaged.
    """
    paths = run.checkpoint_paths()
    with open_tensors(paths[-1]) as file:
        record = file.record(CheckpointRecord)
    count = last or parse_recipe(record.recipe).training.average_last
    chosen = [path for path in paths if int(path.stem.removeprefix("step-")) >= from_step][-count:]
    if not chosen:
        raise CheckpointError(
            f"{run.path} has no checkpoint from step {from_step} on; its last is {paths[-1].stem}.",
            mend="Give --from-step an earlier step.",
        )
    average_checkpoints(chosen, output, batch_norm=batch_norm, training=training, force=force)
    return chosen
