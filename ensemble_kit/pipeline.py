"""Stages in a row. Stages never import each other; this module may import them all."""

from dataclasses import dataclass
from pathlib import Path

from ensemble_kit.averaging import AveragedRun, BatchNormRule, Method, average_checkpoints
from ensemble_kit.checkpoints import open_tensors
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError
from ensemble_kit.evaluation import evaluate_predictions
from ensemble_kit.metrics_log import read_metrics
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
    workers: int = 0,
    device: str = "cpu",
    tensorboard: bool = False,
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
        workers=workers,
        device=device,
        tensorboard=tensorboard,
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
    method: Method = "uniform",
    last: int | None = None,
    from_step: int = 0,
    batch_norm: BatchNormRule = "recalibrate",
    training: Records | None = None,
    validation: Records | None = None,
    even_if_worse: bool = False,
    device: str = "cpu",
    force: bool = False,
) -> AveragedRun:
    """Average a run's last checkpoints, unless one of its checkpoints alone is better.

    The GAPs that training logged are not measured again where ``validation`` is what it measured
    on, and all checkpoints that are left count, also those that are not averaged.

    Args:
        run: The run's folder.
        output: The file to write.
        method: ``uniform``, ``greedy``, or ``ema`` for the run's exponential moving average.
        last: How many checkpoints, of those that training has left; None takes the recipe's
            ``training.average_last``, or all for ``greedy``.
        from_step: Checkpoints of earlier steps are left out.
        batch_norm: See ``average_checkpoints``; so for the other arguments.
        training: Records to re-estimate batch norm on.
        validation: Records to compare on.
        even_if_worse: Whether an average that loses is written too.
        device: ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Raises:
        CheckpointError: There are no such checkpoints, or they cannot be averaged.
        AveragingError: There are no validation records for ``greedy``.
    """
    paths = run.checkpoint_paths()
    with open_tensors(paths[-1]) as file:
        record = file.record(CheckpointRecord)
    if method == "ema":
        chosen = [_moving_average(run), paths[-1]]
    else:
        average_last = parse_recipe(record.recipe).training.average_last
        count = last or (len(paths) if method == "greedy" else average_last)
        chosen = [path for path in paths if _step(path) >= from_step][-count:]
    if not chosen:
        raise CheckpointError(
            f"{run.path} has no checkpoint from step {from_step} on; its last is {paths[-1].stem}.",
            mend="Give --from-step an earlier step.",
        )
    is_logged = validation is None or validation.patterns == record.validation_files
    logged = _logged_gaps(run) if is_logged else {}
    return average_checkpoints(
        chosen,
        output,
        method=method,
        batch_norm=batch_norm,
        training=training,
        validation=validation,
        known_gaps={path: logged[_step(path)] for path in paths if _step(path) in logged},
        even_if_worse=even_if_worse,
        device=device,
        force=force,
    )


def _moving_average(run: RunFolder) -> Path:
    if not run.ema.is_file():
        raise CheckpointError(
            f"{run.path} holds no exponential moving average ({run.ema.name}).",
            mend="Train with --ema 0.999, or average with another --method.",
        )
    return run.ema


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def _logged_gaps(run: RunFolder) -> dict[int, float]:
    """Return the validation GAP of every step that training measured."""
    lines = read_metrics(run.metrics)
    return {line["step"]: line["validation"]["gap"] for line in lines if "validation" in line}
