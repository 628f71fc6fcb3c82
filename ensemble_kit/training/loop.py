"""The steps of one run, from its beginning or from its saved state, to its end."""

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from math import isfinite
from typing import Any, NamedTuple

from torch import Tensor

from ensemble_kit._version import __version__
from ensemble_kit.data.dataset import Batch
from ensemble_kit.errors import TrainingError
from ensemble_kit.interrupts import interrupts_wait
from ensemble_kit.metrics import Metrics
from ensemble_kit.networks.building import TrainedModel
from ensemble_kit.networks.storage import is_finite
from ensemble_kit.progress import Progress
from ensemble_kit.store.provenance import CheckpointMetadata, MeasuredMetadata
from ensemble_kit.store.run_log import MetricsLog
from ensemble_kit.store.tensor_files import save_tensors
from ensemble_kit.store.workspace import RunLock
from ensemble_kit.training.gradients import Differentiator
from ensemble_kit.training.moving_average import MovingAverage
from ensemble_kit.training.optimisation import Optimiser
from ensemble_kit.training.pace import Pace
from ensemble_kit.training.plan import RunPlan, TrainedRun
from ensemble_kit.training.processes import Processes
from ensemble_kit.training.state import (
    Position,
    fitting,
    read_state,
    remove_checkpoints,
    save_state,
    seed_step,
)
from ensemble_kit.training.validation import measure_together

LOG_EVERY = 50  # steps between two lines of metrics.jsonl
MODEL = "model."  # prefixes of the names of a state's tensors
ADAM = "adam."
EMA = "ema."


class Writer(NamedTuple):
    """What the process that writes the run's files has and the others lack."""

    lock: RunLock
    log: MetricsLog


class Trainer:
    """A run while it is being trained.

    Args:
        plan: The run.
        model: Its model with its initial parameters.
        position: How far the run has come.
        processes: The processes that train it together.
        writer: The run's lock and log, in the first process; None in the others.
        log_every: Steps between two lines of the log.
    """

    def __init__(
        self,
        plan: RunPlan,
        model: TrainedModel,
        position: Position,
        processes: Processes,
        writer: Writer | None,
        log_every: int = LOG_EVERY,
    ) -> None:
        self.plan = plan
        self.schedule = plan.recipe.training
        self.model = model
        self.position = position
        self.processes = processes
        self.writer = writer
        self.log_every = log_every
        self.epoch = 0
        self.differentiate = Differentiator(plan, model, processes)
        self.optimiser = Optimiser(model, self.schedule)
        self.average: MovingAverage | None = None
        if plan.ema is not None and processes.is_first:
            self.average = MovingAverage(model, plan.ema)
        self.saved = position.step  # the step of the state on disk
        self.seconds_before = position.seconds
        self.pace = Pace(position.examples)
        self.start = time.monotonic()

    def restore(self) -> None:
        """Load weights and Adam's moments from the run's state.

        Raises:
            CheckpointError: The state is damaged.
        """
        tensors = self.processes.share(self._read_state() if self.processes.is_first else {})
        self.model.load_state_dict(_under(MODEL, tensors))
        self.optimiser.restore(_under(ADAM, tensors))
        if self.average is not None:
            self.average.restore(_under(EMA, tensors))

    def _read_state(self) -> dict[str, Tensor]:
        tensors = read_state(self.plan.run)
        state = self.model.state_dict()
        wanted = {MODEL + name: tensor for name, tensor in state.items()}
        moments = self.optimiser.expected(_under(ADAM, tensors))
        wanted |= {ADAM + name: tensor for name, tensor in moments}
        if self.average is not None:
            wanted |= {EMA + name: tensor for name, tensor in state.items()}
        return fitting(self.plan.run, tensors, wanted)

    def train(self, shown: Progress) -> TrainedRun:
        """Take all steps that are left, or those before an interrupt."""
        is_stopped = False
        try:
            self._advance(shown)
        except KeyboardInterrupt:
            if self.processes.count > 1:
                raise  # the others may be at another step
            is_stopped = True
            with interrupts_wait():
                if self.position.step > self.saved:
                    self._save_checkpoint()
                    self._save_state()
                self._write(state="stopped", seconds=round(self._seconds(), 2))
            self.position.seconds = self._seconds()
        return self.position.as_run(self.plan, is_stopped=is_stopped)

    def _advance(self, shown: Progress) -> None:
        with closing(self._batches()) as batches:
            while not self._is_finished():
                if self._is_checkpoint_due():
                    with self.pace.aside():
                        self._checkpoint()
                    continue
                with self.pace.waiting():
                    batch = next(batches)
                self.model.train()
                with interrupts_wait():
                    self._take(batch, shown)

    def _batches(self) -> Generator[Batch, None, None]:
        yield from self.plan.training.training_batches(
            self.schedule.batch_size,
            seed=self.plan.seed,
            start=self.position.batches,
            choice=self.model.frame_choice,
            workers=self.plan.workers,
            rank=self.processes.rank,
            num_ranks=self.processes.count,
            balance=self.schedule.balance,
        )

    def _is_checkpoint_due(self) -> bool:
        step, every = self.position.step, self.schedule.checkpoint_every
        is_regular = step % every == 0 or step == self.schedule.max_steps
        return step > 0 and is_regular and not self.position.is_measured

    def _is_finished(self) -> bool:
        position, patience = self.position, self.plan.patience
        is_hopeless = patience is not None and position.num_without_gain >= patience
        return position.is_measured and (position.step == self.schedule.max_steps or is_hopeless)

    def _take(self, batch: Batch, shown: Progress) -> None:
        position = self.position
        position.batches += 1
        self.epoch = batch.epoch
        counts = self.processes.gather_number(len(batch.ids))
        if not all(counts):  # every record of one process was bad and skipped
            return
        seed_step(self.plan.seed, position.step, self.processes.rank)
        self.optimiser.clear()
        loss = self.differentiate(batch, counts)
        if not isfinite(loss):
            self._write(state="failed", loss=str(loss), videos=batch.ids)
            raise self._diverged(f"the loss is {loss} at step {position.step + 1}", batch)
        rate = self.optimiser.step(position.examples)
        position.step += 1
        position.examples += int(sum(counts))
        if self.average is not None:
            self.average.update(position.step)
        now = {"loss": loss, "learning_rate": rate, **self.pace.figures(position.examples)}
        if position.step % self.log_every == 0 or position.step == 1:
            self._write(**now)
            self.pace.restart(position.examples)
        shown.update(position.step, gap=position.gaps[-1] if position.gaps else None, **now)

    def _checkpoint(self) -> None:
        """Write a checkpoint, measure it, then record both in the state in one step."""
        with interrupts_wait():
            self._save_checkpoint()
        metrics = self._measure()
        with interrupts_wait():
            if metrics is not None:
                self._write(validation=metrics.as_dict())
            gap = None if metrics is None else metrics.gap
            self.position.measured.append(MeasuredMetadata(step=self.position.step, gap=gap))
            if self._is_finished():
                self._write(state="finished", seconds=round(self._seconds(), 2))
            self._save_state()

    def _save_checkpoint(self) -> None:
        if self.writer is None:
            return
        self.writer.lock.require_folder()
        tensors = self.model.state_dict()
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                self._write(state="failed")
                raise self._diverged(f"{name} is no longer finite at step {self.position.step}")
        part = self.plan.training.part
        metadata = CheckpointMetadata(
            kit_version=__version__,
            name=self.plan.run.name,
            run=self.plan.identity(),
            recipe=self.plan.recipe.metadata,
            data_schema=self.plan.training.schema,
            step=self.position.step,
            examples=self.position.examples,
            seed=self.plan.seed,
            training_files=self.plan.training.patterns,
            validation_files=self.plan.validation.patterns if self.plan.validation else (),
            fold=None if part is None else str(part.fold),
        )
        path = self.plan.run.checkpoint(self.position.step)
        save_tensors(path, tensors, metadata, force=True)
        if self.average is not None:
            metadata = metadata.model_copy(update={"ema_decay": self.average.decay})
            save_tensors(self.plan.run.ema, self.average.tensors, metadata, force=True)

    def _save_state(self) -> None:
        self.position.seconds = self._seconds()
        self.saved = self.position.step
        if self.writer is None:
            return
        self.writer.lock.require_folder()
        tensors: dict[str, Tensor] = {}
        if not self._is_finished():  # nothing resumes from a finished state
            tensors = {MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
            tensors |= {ADAM + name: tensor for name, tensor in self.optimiser.tensors()}
            if self.average is not None:
                tensors |= {EMA + name: tensor for name, tensor in self.average.tensors.items()}
        self.writer.log.sync()  # so that no line is newer than the state
        save_state(self.plan, self.position, tensors, is_finished=self._is_finished())
        kept = self.position.kept(self.plan.num_kept) | {self.position.step}
        remove_checkpoints(self.plan.run, but=kept)  # the state no longer refers to the others

    def _measure(self) -> Metrics | None:
        if self.plan.validation is None:
            return None
        return measure_together(
            self.model,
            self.plan.validation,
            name=self.plan.run.name,
            device=self.plan.device,
            processes=self.processes,
        )

    def _diverged(self, what: str, batch: Batch | None = None) -> TrainingError:
        videos = f" (videos {', '.join(batch.ids[:3])}, ...)" if batch else ""
        measured = self.position.measured
        last = self.plan.run.checkpoint(measured[-1].step) if measured else "none"
        return TrainingError(
            f"{self.plan.folder}: {what}{videos}. Its last good checkpoint: {last}.",
            hint="Train it under another --name with --set training.learning_rate=LOWER.",
        )

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    def _write(self, **values: Any) -> None:
        position = self.position
        if self.writer is not None:
            self.writer.log.write(
                step=position.step, examples=position.examples, epoch=self.epoch, **values
            )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, by their names without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
