"""Train one sub-model: the papers' optimisation, checkpoints at steps, a log of metrics.

Google's starter code and every system built on it optimise alike (google/youtube-8m, ``train.py``):
Adam, a learning rate that falls in stairs of examples seen, each variable's gradient clipped by
itself, cross entropy on probabilities, an L2 penalty on the head's kernels.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ensemble_kit
from ensemble_kit.checkpoints import save_tensors
from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.errors import TrainingError
from ensemble_kit.loading import check_fits, measure, require_device, runner, to_torch
from ensemble_kit.metrics_log import MetricsLog, require_tensorboard
from ensemble_kit.progress import Progress, progress
from ensemble_kit.provenance import CheckpointRecord
from ensemble_kit.recipe_tables import Training
from ensemble_kit.recipes import Recipe
from ensemble_kit.submodel import SubModel
from ensemble_kit.workspace import RunFolder, check_run_name

LOG_EVERY = 50  # steps between two lines of metrics.jsonl
LOG_EPSILON = 1e-5


@dataclass(frozen=True)
class TrainedRun:
    """What a run has left behind.

    Attributes:
        folder: Where.
        steps: Optimisation steps taken.
        is_stopped: Whether it was interrupted before its last step.
        best_gap: The best validation GAP@20 of any checkpoint; None without validation records.
        seconds: How long it took.
    """

    folder: RunFolder
    steps: int
    is_stopped: bool
    best_gap: float | None
    seconds: float


def cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return ``mean_b sum_c -(y log(p + 1e-5) + (1 - y) log(1 - p + 1e-5))``.

    The starter code's loss, in probability space because a mixture of sigmoids has no logits. A sum
    over classes, so C ln 2 where all probabilities are one half.

    Args:
        probabilities: ``(B, C)`` in [0, 1].
        labels: ``(B, C)``, 0 or 1, floating point.
    """
    positive = labels * (probabilities + LOG_EPSILON).log()
    negative = (1 - labels) * (1 - probabilities + LOG_EPSILON).log()
    return -(positive + negative).sum(dim=1).mean()


def learning_rate_at(schedule: Training, examples: int) -> float:
    """Return ``rate * decay ^ floor(examples / examples_per_decay)``: a staircase in examples."""
    stairs = examples // schedule.examples_per_decay
    return schedule.learning_rate * schedule.learning_rate_decay**stairs


def clip_each(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale each gradient by itself, in place, to an L2 norm of at most ``limit``.

    The reference's ``clip_by_norm``, variable by variable, and not the global norm.
    """
    norms = torch._foreach_norm(list(gradients))
    scales = [limit / norm.clamp_min(limit) for norm in norms]
    torch._foreach_mul_(list(gradients), scales)


def train_checkpoints(
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
) -> TrainedRun:
    """Train a recipe, writing ``checkpoints/step-*.safetensors`` and ``metrics.jsonl``.

    An interrupt (Ctrl-C) writes a checkpoint of the step it came in and returns.

    Args:
        recipe: What to train, and for how long.
        training: The records to learn from.
        validation: The records whose GAP@20 each checkpoint is measured by, or None.
        folder: The run's folder; its name is the run's.
        seed: Of the parameters' start, the order of the videos and the frames drawn.
        workers: Processes that read the training records ahead; 0 reads in this one. The weights
            are the same for any number.
        device: ``cpu`` or ``cuda``.
        tensorboard: Whether the log is written for TensorBoard too.
        force: Whether a run that is there may be replaced.

    Raises:
        OutputError: The folder holds a run and ``force`` is False.
        RecipeError: The recipe does not fit the records.
        PredictionsError: Training and validation records do not belong together.
        ProviderError: There is no such device.
        TrainingError: The name cannot be used, TensorBoard is not installed, or the loss is no
            longer finite.
    """
    check_run_name(folder.name)
    if tensorboard:
        require_tensorboard()
    require_device(device)
    if validation is not None:
        check_fits(training.schema, validation.schema, path=training.paths[0].parent)
    torch.manual_seed(seed)
    model = SubModel(recipe, training.schema).to(device)
    run = RunFolder(folder)
    run.claim(force=force)
    with MetricsLog(run.metrics, tensorboard=run.tensorboard if tensorboard else None) as log:
        trainer = _Trainer(recipe, model, training, validation, run, seed, workers, device, log)
        with progress(folder.name, recipe.training.max_steps) as shown:
            return trainer.train(shown)


class _Trainer:
    """The state of one run while it trains."""

    def __init__(
        self,
        recipe: Recipe,
        model: SubModel,
        training: Records,
        validation: Records | None,
        run: RunFolder,
        seed: int,
        workers: int,
        device: str,
        log: MetricsLog,
    ) -> None:
        self.recipe = recipe
        self.schedule = recipe.training
        self.model = model
        self.training = training
        self.validation = validation
        self.run = run
        self.seed = seed
        self.workers = workers
        self.device = device
        self.log = log
        self.step = 0
        self.examples = 0
        self.epoch = 0
        self.gaps: list[float] = []
        self.parameters = list(model.parameters())
        self.optimiser = torch.optim.Adam(
            self.parameters, lr=self.schedule.learning_rate, betas=(0.9, 0.999), eps=1e-8
        )
        self.identity = _identify(recipe, training, seed)

    def train(self, shown: Progress) -> TrainedRun:
        """Take all steps, or those until an interrupt."""
        start = time.monotonic()
        is_stopped = False
        saved = 0
        try:
            for batch in self._batches():
                self.model.train()
                loss, rate = self._step(batch)
                speed = round(self.examples / (time.monotonic() - start), 1)
                now = {"loss": loss, "learning_rate": rate, "examples_per_second": speed}
                if self.step % LOG_EVERY == 0 or self.step == 1:
                    self._write(**now)
                shown.update(self.step, gap=self.gaps[-1] if self.gaps else None, **now)
                is_last = self.step == self.schedule.max_steps
                if is_last or self.step % self.schedule.checkpoint_every == 0:
                    self._save()
                    saved = self.step
                    self._validate()
                if is_last:
                    break
        except KeyboardInterrupt:
            is_stopped = True
            if self.step > saved:
                self._save()
        seconds = time.monotonic() - start
        state = "stopped" if is_stopped else "finished"
        self._write(state=state, seconds=round(seconds, 2))
        best = max(self.gaps, default=None)
        return TrainedRun(self.run, self.step, is_stopped, best, seconds)

    def _batches(self) -> Iterator[Batch]:
        batches = self.training.training_batches(
            self.schedule.batch_size,
            seed=self.seed,
            choice=self.model.frame_choice,
            workers=self.workers,
        )
        for batch in batches:
            self.epoch = batch.epoch
            if batch.ids:  # else every record of it was bad, and skipped
                yield batch

    def _step(self, batch: Batch) -> tuple[float, float]:
        rate = learning_rate_at(self.schedule, self.examples)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        labels = torch.from_numpy(batch.labels.dense(self.training.schema.num_classes))
        weights = batch.frame_weights
        probabilities = self.model(
            *to_torch(batch, self.device),
            frame_weights=None if weights is None else torch.from_numpy(weights).to(self.device),
        )
        loss = cross_entropy(probabilities, labels.to(self.device, probabilities.dtype))
        penalty = sum(kernel.square().sum() for kernel in self.model.regularised())
        self.optimiser.zero_grad(set_to_none=True)
        total = loss + 0.5 * self.schedule.l2_penalty * penalty
        if (distance := self.model.penalty()) is not None:
            total = total + distance
        total.backward()  # type: ignore[no-untyped-call]
        clip_each([p.grad for p in self.parameters if p.grad is not None], self.schedule.clip_norm)
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise TrainingError(
                f"{self.run.path}: the loss is {value} at step {self.step + 1} "
                f"(videos {', '.join(batch.ids[:3])}, ...).",
                mend="Lower training.learning_rate with --set, or average the checkpoints so far.",
            )
        self.optimiser.step()
        self.step += 1
        self.examples += len(batch.ids)
        return value, rate

    def _save(self) -> None:
        record = CheckpointRecord(
            kit_version=ensemble_kit.__version__,
            name=self.run.path.name,
            run=self.identity,
            recipe=self.recipe.record,
            data_schema=self.training.schema,
            step=self.step,
            examples=self.examples,
            seed=self.seed,
            training_files=self.training.patterns,
        )
        path = self.run.checkpoint(self.step)
        save_tensors(path, self.model.state_dict(), record, force=True)

    def _validate(self) -> None:
        if self.validation is None:
            return
        # the same single draw at every checkpoint
        draws = self.model.draws_for(self.run.path.name, repeats=1)
        metrics = measure(runner(self.model.eval(), draws, self.device), self.validation)
        self.gaps.append(metrics.gap)
        self._write(validation=metrics.as_dict())

    def _write(self, **values: Any) -> None:
        self.log.write(step=self.step, examples=self.examples, epoch=self.epoch, **values)


def _identify(recipe: Recipe, training: Records, seed: int) -> str:
    """Return a hash of all that makes a run what it is: only its own checkpoints share it."""
    parts = [recipe.model_dump_json(), training.schema.model_dump_json(), str(seed)]
    parts += [f"{path.name}:{path.stat().st_size}" for path in training.paths]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
