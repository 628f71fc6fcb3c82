"""Stages in a row. Stages never import each other; this module may import them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble_kit.averaging.stage import AveragedRun, average_checkpoints
from ensemble_kit.choices import DEVICE, PRECISION, TEACHER_SHARE, BatchNormRule, Method, Precision
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError
from ensemble_kit.inference import evaluate_predictions, predict
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.recipes.reading import Recipe, parse_recipe
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.run_log import read_metrics
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.workspace import RunFolder
from ensemble_kit.training import train_checkpoints
from ensemble_kit.training.plan import RunPlan, TrainedRun
from ensemble_kit.training.processes import join


@dataclass(frozen=True)
class FinishedRun:
    """A trained run and what became of its checkpoints.

    Attributes:
        trained: The run.
        averaged: What its averaged checkpoint is, in words; None where training was interrupted,
            and in all processes that torchrun has started but the first.
        averaged_gap: The validation GAP@20 of that; None without validation records.
    """

    trained: TrainedRun
    averaged: str | None
    averaged_gap: float | None


def train(
    recipe: Recipe,
    *,
    training: Records,
    validation: Records | None,
    folder: Path,
    seed: int = 0,
    workers: int = 0,
    device: str = DEVICE,
    tensorboard: bool = False,
    ema: float | None = None,
    patience: int | None = None,
    keep: int | None = None,
    accumulate: int = 1,
    precision: Precision = PRECISION,
    compiled: bool = False,
    teacher: Path | None = None,
    teacher_share: float = TEACHER_SHARE,
    force: bool = False,
) -> FinishedRun:
    """Train a recipe, settle on its best weights and predict the validation records.

    These are the best of the mean of the last checkpoints, the exponential moving average where one
    was kept, and the best checkpoint alone, by the GAP@20 of the validation records; without such,
    the mean.

    What of this is done already is not done again: a run that was killed goes on from where it was.
    An interrupted run keeps its checkpoints and is neither averaged nor predicted. See ``RunPlan``,
    ``train_checkpoints``, ``average_checkpoints`` and ``predict`` for arguments and faults.
    """
    plan = RunPlan(
        recipe=recipe,
        training=training,
        validation=validation,
        folder=folder,
        seed=seed,
        workers=workers,
        device=device,
        tensorboard=tensorboard,
        ema=ema,
        patience=patience,
        keep=keep,
        accumulate=accumulate,
        precision=precision,
        compiled=compiled,
        teacher=teacher,
        teacher_share=teacher_share,
    )
    return finish_run(plan, force=force)


def finish_run(plan: RunPlan, *, force: bool = False) -> FinishedRun:
    """Do what is left to do of a run; see ``train``."""
    trained = train_checkpoints(plan, force=force)
    if trained.is_stopped:
        return FinishedRun(trained, None, None)
    if not join(plan.device).is_first:  # the first process does the rest
        return FinishedRun(trained, None, None)
    run = trained.folder
    if not run.averaged.exists():
        settle_run(plan)
    with open_tensors(run.averaged) as file:
        averaged = _describe(file.metadata_as(CheckpointMetadata))
    if plan.validation is None:
        return FinishedRun(trained, averaged, None)
    if not run.validation.exists():
        predict(run.averaged, plan.validation, run.validation, device=plan.device)
    metrics = evaluate_predictions(read_predictions(run.validation), None, k=20)
    return FinishedRun(trained, averaged, metrics.gap)


def _describe(record: CheckpointMetadata) -> str:
    if record.ema_decay is not None:
        return "the moving average"
    if len(record.averaged_from) == 1:
        return f"checkpoint {record.step} alone"
    return f"the mean of {len(record.averaged_from)} checkpoints"


def settle_run(plan: RunPlan) -> None:
    """Write the best of a run's averages and checkpoints as its averaged checkpoint."""
    run = plan.run
    if plan.validation is None:
        average_run(run, run.averaged, training=plan.training, device=plan.device)
        return
    asides: dict[Path, float] = {}
    for method in ("uniform", "ema") if plan.ema is not None else ("uniform",):
        aside = run.path / f".{method}.safetensors"  # beside it, as the file names its parents
        outcome = average_run(
            run,
            aside,
            method=method,
            training=plan.training,
            validation=plan.validation,
            device=plan.device,
            force=True,
        )
        if outcome.path is not None and outcome.gap is not None:
            asides[aside] = outcome.gap
    if not asides:
        gaps = _logged_gaps(run, run.checkpoint_paths())
        best = max(sorted(gaps), key=gaps.__getitem__)
        aside = run.path / ".best.safetensors"
        average_checkpoints(
            [best],
            aside,
            method="greedy",  # which leaves one checkpoint as it was trained
            validation=plan.validation,
            known_gaps={best: gaps[best]},
            device=plan.device,
            force=True,
        )
        asides[aside] = gaps[best]
    winner = max(asides, key=asides.__getitem__)
    for aside in asides.keys() - {winner}:
        aside.unlink()
    winner.replace(run.averaged)


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
    device: str = DEVICE,
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
        record = file.metadata_as(CheckpointMetadata)
    if method == "ema":
        chosen = [_moving_average(run), paths[-1]]
    else:
        average_last = parse_recipe(record.recipe).training.average_last
        count = last or (len(paths) if method == "greedy" else average_last)
        chosen = [path for path in paths if _step(path) >= from_step][-count:]
    if not chosen:
        raise CheckpointError(
            f"{run.path} has no checkpoint from step {from_step} on; its last is {paths[-1].stem}.",
            hint="Give --from-step an earlier step.",
        )
    is_logged = validation is None or validation.patterns == record.validation_files
    return average_checkpoints(
        chosen,
        output,
        method=method,
        batch_norm=batch_norm,
        training=training,
        validation=validation,
        known_gaps=_logged_gaps(run, paths) if is_logged else {},
        even_if_worse=even_if_worse,
        device=device,
        force=force,
    )


def _moving_average(run: RunFolder) -> Path:
    if not run.ema.is_file():
        raise CheckpointError(
            f"{run.path} holds no exponential moving average ({run.ema.name}).",
            hint="Train with --ema 0.999, or average with another --method.",
        )
    return run.ema


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def _logged_gaps(run: RunFolder, paths: Sequence[Path]) -> dict[Path, float]:
    """Return the validation GAPs that training measured of these checkpoints."""
    gaps = {
        run.checkpoint(line["step"]): line["validation"]["gap"]
        for line in read_metrics(run.metrics)
        if "validation" in line
    }
    return {path: gaps[path] for path in paths if path in gaps}
