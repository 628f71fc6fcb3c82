"""A run from its folder to its end: what is begun, gone on with, or left as it is."""

from contextlib import ExitStack

from ensemble_kit.networks.running import seeded
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.progress import progress, quietly
from ensemble_kit.store.provenance import TrainingStateMetadata
from ensemble_kit.store.run_log import MetricsLog
from ensemble_kit.training.loop import Trainer
from ensemble_kit.training.plan import RunPlan, TrainedRun
from ensemble_kit.training.processes import Processes, join
from ensemble_kit.training.state import (
    Position,
    forget_what_came_after,
    position_of,
    remove_checkpoints,
    save_state,
)


def train_checkpoints(plan: RunPlan, *, force: bool = False) -> TrainedRun:
    """Train a run to its end, writing ``checkpoints/step-*.safetensors`` and ``metrics.jsonl``.

    A run that was left before its end, by Ctrl-C, by a crash, by SIGKILL, goes on from its state,
    ``state.safetensors``, and ends as if nothing had happened: on a CPU with the same bits. One
    that is finished is left as it is. An interrupt (Ctrl-C) writes a checkpoint and the state of
    the step it came in and returns.

    Where torchrun has started several processes, each trains on its share of every batch, and the
    first one writes. Ctrl-C then ends them all, and the run goes on from its last checkpoint.

    Args:
        plan: What to train on what, and where.
        force: Whether a run that is there is replaced.

    Raises:
        OutputError: The folder holds another run and ``force`` is False, or the disk refuses a
            file; what was written before is whole.
        RecipeError: The recipe does not fit the records.
        PredictionsError: Training and validation records do not belong together.
        ProviderError: There is no such device.
        TrainingError: The name cannot be used, another process trains the run, or the loss is no
            longer finite.
    """
    processes = join(plan.device)
    found = _tell(processes, plan.find(force=force) if processes.is_first else None)
    if found is not None and found.is_finished:
        return _finished_before(plan, position_of(found), processes)
    with ExitStack() as stack:
        stack.enter_context(seeded(plan.seed, plan.device))
        model = SubModel(plan.recipe, plan.training.schema).to(plan.device)
        log = None
        if processes.is_first:
            stack.enter_context(plan.run.locked())
            found = plan.find(force=force)  # again, now that no other process can change it
            log = stack.enter_context(_open_log(plan, found, force=force))
        else:
            stack.enter_context(quietly())
        found = _tell(processes, found)
        position = position_of(found) if found else Position()
        trainer = Trainer(plan, model, position, processes, log)
        if position.step:
            trainer.restore()
        total = plan.recipe.training.max_steps
        shown = stack.enter_context(progress(plan.folder.name, total, done=position.step))
        return trainer.train(shown)


def _finished_before(plan: RunPlan, position: Position, processes: Processes) -> TrainedRun:
    if processes.is_first:
        remove_checkpoints(plan.run, but=position.kept(plan.num_kept))  # if a kill left any
    return TrainedRun(
        plan.run, position.step, False, position.best_gap, position.seconds, was_finished=True
    )


def _open_log(plan: RunPlan, found: TrainingStateMetadata | None, *, force: bool) -> MetricsLog:
    """Make the run's folder what its state says, and return its log."""
    if found is not None:
        forget_what_came_after(plan.run, position_of(found))
    else:
        plan.run.claim(force=force)
        save_state(plan, Position(), {})
    return MetricsLog(
        plan.run.metrics,
        tensorboard=plan.run.tensorboard if plan.tensorboard else None,
        after_step=found.step if found else 0,
    )


def _tell(
    processes: Processes, found: TrainingStateMetadata | None
) -> TrainingStateMetadata | None:
    """Return in all processes what the first one has found."""
    told = processes.tell(None if found is None else found.model_dump_json())
    return None if told is None else TrainingStateMetadata.model_validate_json(told, strict=True)
