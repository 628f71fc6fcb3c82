"""Several stages in a row. Stages never import each other; this module may import all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import exists, isfile
from pathlib import Path

from ensemble_kit.averaging.average import Observer
from ensemble_kit.averaging.stage import AveragedRun, average_checkpoints
from ensemble_kit.choices import (
    BATCH_NORM_RULE,
    DEVICE,
    METHOD,
    TOP_K,
    BatchNormRule,
    Dtype,
    Method,
)
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError, TrainingError
from ensemble_kit.inference import KeptPredictions, evaluate_predictions, predict
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.recipes.reading import parse_recipe
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.run_log import read_metrics
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.workspace import RunFolder
from ensemble_kit.training import train_checkpoints
from ensemble_kit.training.plan import RunPlan, TrainedRun
from ensemble_kit.training.processes import join


@dataclass(frozen=True)
class FinishedRun:
    """A trained run and its averaged checkpoint.

    Attributes:
        trained: The run.
        averaged: What its averaged checkpoint is, in words; None where training was interrupted,
            and in all processes that torchrun has started except the first.
        averaged_gap: The validation GAP@20 of that checkpoint; None without validation records.
    """

    trained: TrainedRun
    averaged: str | None
    averaged_gap: float | None


@dataclass(frozen=True)
class _Candidate:
    """An averaged checkpoint that a run may settle on.

    Attributes:
        path: The file, beside the run's averaged checkpoint.
        gap: Its validation GAP@20.
        predictions: Its validation predictions, where measuring it has computed them.
    """

    path: Path
    gap: float
    predictions: KeptPredictions | None = None


def train(
    plan: RunPlan, *, predict_dtypes: Sequence[Dtype] = (), force: bool = False
) -> FinishedRun:
    """Train a run, settle on its best weights and predict the validation records.

    The candidates are the mean of the last checkpoints, the exponential moving average if the run
    kept one, and the best single checkpoint. The one with the best GAP@20 on the validation records
    is kept; without validation records, it is the mean.

    Work that is done already is not done again: a run that was killed resumes from its state. An
    interrupted run keeps its checkpoints and is neither averaged nor predicted.

    Args:
        plan: The run.
        predict_dtypes: Precisions to predict the validation records in too, each in a file of its
            own, for ``select``.
        force: Whether a run that the folder holds is replaced.

    Raises:
        EnsembleKitError: See ``train_checkpoints``, ``average_checkpoints`` and ``predict``.
    """
    trained = train_checkpoints(plan, force=force)
    if trained.is_stopped or not join(plan.device).is_first:  # the first process does the rest
        return FinishedRun(trained, None, None)
    run = trained.folder
    winner = None if exists(run.averaged) else _settle(plan, trained)
    with open_tensors(run.averaged) as file:
        averaged = _describe(file.metadata_as(CheckpointMetadata))
        if winner is not None and winner.predictions is not None and not exists(run.validation):
            winner.predictions.write(run.validation, model=file)
    if plan.validation is None:
        return FinishedRun(trained, averaged, None)
    for dtype in (None, *predict_dtypes):
        path = run.validation if dtype is None else run.validation_in(dtype)
        if not exists(path):
            predict(run.averaged, plan.validation, path, dtype=dtype, device=plan.device)
    if winner is not None:
        return FinishedRun(trained, averaged, winner.gap)
    metrics = evaluate_predictions(read_predictions(run.validation), None, k=TOP_K)
    return FinishedRun(trained, averaged, metrics.gap)


def _describe(metadata: CheckpointMetadata) -> str:
    if metadata.ema_decay is not None:
        return "the moving average"
    if len(metadata.averaged_from) == 1:
        again = " with its batch norm estimated again" if metadata.batch_norm != "trained" else ""
        return f"checkpoint {metadata.step} alone{again}"
    return f"the mean of {len(metadata.averaged_from)} checkpoints"


def _settle(plan: RunPlan, trained: TrainedRun) -> _Candidate | None:
    """Write a run's averaged checkpoint; return the winner where candidates were compared."""
    run = plan.run
    _require_checkpoints(trained)
    if plan.validation is None:
        average_run(run, run.averaged, training=plan.training, device=plan.device)
        return None
    winner: _Candidate | None = None
    for method in ("uniform", "ema") if plan.ema is not None else ("uniform",):
        candidate = _average_aside(plan, method)
        if candidate is None or (winner is not None and candidate.gap <= winner.gap):
            loser = candidate
        else:
            winner, loser = candidate, winner
        if loser is not None:
            loser.path.unlink()
    winner = winner or _best_aside(plan)
    try:
        winner.path.replace(run.averaged)
    except OSError as error:
        raise TrainingError(
            f"{run.path} was removed or replaced while its checkpoints were averaged.",
            hint="Give the same command again, and leave the folder in place until it ends.",
        ) from error
    return winner


def _require_checkpoints(trained: TrainedRun) -> None:
    """Raise ``TrainingError`` if a checkpoint that training keeps is gone.

    An average of those that are left would be another model, and might lose to the missing one.
    """
    gone = next((path for path in trained.checkpoints if not exists(path)), None)
    if gone is not None:
        raise TrainingError(
            f"{gone} is gone, which the run needs to settle on its best weights.",
            hint="Put it back, or train the run again with --force.",
        )


def _average_aside(plan: RunPlan, method: Method) -> _Candidate | None:
    """Average a run into a file beside its own; None where a single checkpoint is better."""
    aside = plan.run.path / f".{method}.safetensors"  # in its folder: the file names its parents
    predictions = KeptPredictions()
    outcome = average_run(
        plan.run,
        aside,
        method=method,
        training=plan.training,
        validation=plan.validation,
        observe=predictions.add,
        device=plan.device,
        force=True,
    )
    if outcome.path is None or outcome.gap is None:
        return None
    return _Candidate(aside, outcome.gap, predictions)


def _best_aside(plan: RunPlan) -> _Candidate:
    """Write a run's best single checkpoint as it is, as an averaged checkpoint."""
    gaps = _logged_gaps(plan.run, plan.run.checkpoint_paths())
    best = max(sorted(gaps), key=gaps.__getitem__)
    aside = plan.run.path / ".best.safetensors"
    average_checkpoints(
        [best],
        aside,
        method="greedy",  # leaves a single checkpoint as it was trained
        validation=plan.validation,
        known_gaps={best: gaps[best]},
        device=plan.device,
        force=True,
    )
    return _Candidate(aside, gaps[best])


def average_run(
    run: RunFolder,
    output: Path,
    *,
    method: Method = METHOD,
    last: int | None = None,
    from_step: int = 0,
    batch_norm: BatchNormRule = BATCH_NORM_RULE,
    training: Records | None = None,
    validation: Records | None = None,
    observe: Observer | None = None,
    even_if_worse: bool = False,
    device: str = DEVICE,
    force: bool = False,
) -> AveragedRun:
    """Average a run's last checkpoints, unless one of its checkpoints alone is better.

    GAPs that training logged are not measured again if ``validation`` is what it measured them on.
    Every checkpoint that is left is compared with the average, also those that are not averaged.

    Args:
        run: The run's folder.
        output: The file to write.
        method: See ``average_checkpoints``; ``ema`` takes the moving average that training kept.
        last: How many of the last checkpoints; None means as many as the recipe says, and all of
            them for ``greedy``.
        from_step: Earlier checkpoints are left out.
        batch_norm: See ``average_checkpoints``.
        training: Records to recalibrate on.
        validation: Records to compare on.
        observe: See ``average_checkpoints``.
        even_if_worse: Whether an average that loses is written too.
        device: ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Raises:
        CheckpointError: There are no such checkpoints, or they cannot be averaged.
        AveragingError: There are no validation records for ``greedy``.
    """
    paths = run.checkpoint_paths()
    with open_tensors(paths[-1]) as file:
        metadata = file.metadata_as(CheckpointMetadata)
    if method == "ema":
        chosen = [_moving_average(run), paths[-1]]
    else:
        average_last = parse_recipe(metadata.recipe).training.average_last
        count = last or (len(paths) if method == "greedy" else average_last)
        chosen = [path for path in paths if _step(path) >= from_step][-count:]
    if not chosen:
        raise CheckpointError(
            f"{run.path} has no checkpoint from step {from_step} on; its last is {paths[-1].stem}.",
            hint="Give --from-step an earlier step.",
        )
    is_logged = validation is None or (
        validation.patterns == metadata.validation_files
        and metadata.fold == (validation.part and str(validation.part.fold))
    )
    return average_checkpoints(
        chosen,
        output,
        method=method,
        batch_norm=batch_norm,
        training=training,
        validation=validation,
        known_gaps=_logged_gaps(run, paths) if is_logged else {},
        observe=observe,
        even_if_worse=even_if_worse,
        device=device,
        force=force,
    )


def _moving_average(run: RunFolder) -> Path:
    if not isfile(run.ema):
        raise CheckpointError(
            f"{run.path} holds no exponential moving average ({run.ema.name}).",
            hint="Train with --ema 0.999, or average with another --method.",
        )
    return run.ema


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def _logged_gaps(run: RunFolder, paths: Sequence[Path]) -> dict[Path, float]:
    """Return the validation GAPs of these checkpoints that training logged."""
    gaps = {
        run.checkpoint(line["step"]): line["validation"]["gap"]
        for line in read_metrics(run.metrics)
        if "validation" in line
    }
    return {path: gaps[path] for path in paths if path in gaps}
