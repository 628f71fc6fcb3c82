"""Start, resume or skip a run, depending on the state that its folder holds."""

from contextlib import ExitStack

from ensemble_kit.networks.building import trainable_model
from ensemble_kit.networks.running import seeded
from ensemble_kit.progress import progress, quietly
from ensemble_kit.store.provenance import TrainingStateMetadata
from ensemble_kit.store.run_log import MetricsLog
from ensemble_kit.store.trackers import open_trackers
from ensemble_kit.training.loop import Trainer, Writer
from ensemble_kit.training.plan import RunPlan, TrainedRun
from ensemble_kit.training.processes import Processes, join
from ensemble_kit.training.state import (
    Position,
    forget_later_files,
    position_of,
    remove_checkpoints,
    save_state,
)


def train_checkpoints(plan: RunPlan, *, force: bool = False) -> TrainedRun:
    """Train a run to its end, writing ``checkpoints/step-*.safetensors`` and ``metrics.jsonl``.

    A run that ended early, by an interrupt, a crash or SIGKILL, resumes from its
    ``state.safetensors`` and ends as if nothing had happened: on a CPU with the same bits. A
    finished run is left as it is. An interrupt (Ctrl-C, or SIGTERM and SIGHUP where they raise
    ``KeyboardInterrupt``) writes a checkpoint and the state of its step, and returns.

    Where torchrun has started several processes, each trains on its share of every batch, and the
    first one writes. An interrupt then ends them all, and the run resumes from its last checkpoint.

    Args:
        plan: The run.
        force: Whether a run that the folder holds is replaced.

    Raises:
        OutputError: The folder holds another run and ``force`` is False, or the disk refuses a
            file; files written earlier are whole.
        TrainingError: Another process trains the run, the folder was removed meanwhile, or the
            loss is no longer finite.
        RecordError: Records are damaged, or gone.
    """
    processes = join(plan.device)
    with ExitStack() as stack:
        writer = None
        state = None
        if processes.is_first:
            lock = stack.enter_context(plan.run.locked())
            state = plan.find_state(force=force)
        else:
            stack.enter_context(quietly())
        state = _tell(processes, state)
        if state is not None and state.is_finished:
            return _skip(plan, position_of(state), processes)
        stack.enter_context(seeded(plan.seed, plan.device))
        model = trainable_model(plan.recipe, plan.training.schema).to(plan.device)
        if processes.is_first:
            writer = Writer(lock, stack.enter_context(_open_log(plan, state, force=force)))
        position = position_of(state) if state else Position()
        trainer = Trainer(plan, model, position, processes, writer)
        if position.step:
            trainer.restore()
        total = plan.recipe.training.max_steps
        shown = stack.enter_context(progress(plan.run.name, total, done=position.step))
        return trainer.train(shown)


def _skip(plan: RunPlan, position: Position, processes: Processes) -> TrainedRun:
    if processes.is_first:
        remove_checkpoints(plan.run, but=position.kept(plan.num_kept))  # a kill may have left some
    return position.as_run(plan, was_finished=True)


def _open_log(plan: RunPlan, state: TrainingStateMetadata | None, *, force: bool) -> MetricsLog:
    """Bring the run's folder to where its state is, and return its log."""
    if state is not None:
        forget_later_files(plan.run, position_of(state))
    else:
        plan.run.claim(force=force)
        save_state(plan, Position(), {})
    step = state.step if state else 0
    trackers = open_trackers(plan.trackers, plan.run, plan.described(), after_step=step)
    return MetricsLog(plan.run.metrics, trackers=trackers)


def _tell(
    processes: Processes, state: TrainingStateMetadata | None
) -> TrainingStateMetadata | None:
    """Return in every process the state that the first one has found."""
    told = processes.tell(None if state is None else state.model_dump_json())
    return None if told is None else TrainingStateMetadata.model_validate_json(told, strict=True)
