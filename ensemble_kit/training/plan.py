"""What a run is: its recipe, its records and its options, and whether a folder holds it already."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ensemble_kit.choices import DEVICE, PRECISION, TEACHER_SHARE, Precision
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import check_fits
from ensemble_kit.errors import OutputError, TrainingError
from ensemble_kit.networks.running import require_device
from ensemble_kit.recipes.reading import Recipe
from ensemble_kit.store.provenance import TrainingStateMetadata
from ensemble_kit.store.run_log import require_tensorboard
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.workspace import RunFolder, check_run_name
from ensemble_kit.training.teacher import Teacher


@dataclass(frozen=True)
class TrainedRun:
    """What a run has left behind.

    Attributes:
        folder: Where.
        steps: Optimisation steps taken.
        is_stopped: Whether it was interrupted before its last step.
        best_gap: The best validation GAP@20 of any checkpoint; None without validation records.
        seconds: How long training took, that before an interruption too.
        was_finished: Whether it was finished before, so that nothing was left to do.
    """

    folder: RunFolder
    steps: int
    is_stopped: bool
    best_gap: float | None
    seconds: float
    was_finished: bool = False


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run to be trained.

    Attributes:
        recipe: What to train, and for how long.
        training: The records to learn from.
        validation: The records whose GAP@20 each checkpoint is measured by, or None.
        folder: The run's folder; its name is the run's.
        seed: Of the parameters' start, the order of the videos and the frames drawn.
        workers: Processes that read the training records ahead; 0 reads in this one. The weights
            are the same for any number.
        device: ``cpu`` or ``cuda``.
        tensorboard: Whether the log is written for TensorBoard too.
        ema: The decay of an exponential moving average that is kept beside the weights, if any.
        patience: How many checkpoints without a better GAP@20 end the run; None ends it only after
            the recipe's ``max_steps``.
        keep: The last checkpoints that are kept, beside the best; never fewer than the recipe
            averages, which is also what None means.
        precision: ``bf16`` multiplies in bfloat16 (autocast) and keeps weights, statistics, heads
            and the loss in float32.
        compiled: Whether ``torch.compile`` compiles the model.
        accumulate: How many parts a batch is taken in, one after the other, where memory is short.
            Batch norm then sees a part at a time.
        teacher: A predictions file of the training records, which the sub-model learns from too.
        teacher_share: What the teacher counts beside the labels, in [0, 1].
    """

    recipe: Recipe
    training: Records
    validation: Records | None
    folder: Path
    seed: int = 0
    workers: int = 0
    device: str = DEVICE
    tensorboard: bool = False
    ema: float | None = None
    patience: int | None = None
    keep: int | None = None
    precision: Precision = PRECISION
    compiled: bool = False
    accumulate: int = 1
    teacher: Path | None = None
    teacher_share: float = TEACHER_SHARE

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.folder)

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """What makes the run what it is, by the name that a message calls it by."""
        return {
            "recipe": _hash_of([self.recipe.model_dump_json()]),
            "seed": str(self.seed),
            "training records": _hash_of(_describe(self.training)),
            "validation records": _hash_of(_describe(self.validation) if self.validation else []),
            "--ema": str(self.ema),
            "--accumulate": str(self.accumulate),
            "--teacher": _describe_teacher(self.teacher, self.teacher_share),
        }

    @cached_property
    def taught_by(self) -> Teacher | None:
        """The teacher's predictions, open; see ``Teacher`` for faults."""
        if self.teacher is None:
            return None
        return Teacher(self.teacher, self.teacher_share, self.training.schema)

    @property
    def num_kept(self) -> int:
        """How many of the last checkpoints are kept."""
        return max(self.keep or 0, self.recipe.training.average_last)

    @property
    def identity(self) -> str:
        """A hash of the settings: only the run's own checkpoints share it."""
        return _hash_of(f"{name}: {value}" for name, value in self.settings.items())

    def find(self, *, force: bool) -> TrainingStateMetadata | None:
        """Return where the run was left, or None where it is to begin.

        Args:
            force: Whether a run that is there will be replaced.

        Raises:
            OutputError: The folder holds another run and ``force`` is False.
            CheckpointError: The run's state is damaged.
            PredictionsError: Training and validation records or the teacher do not belong together.
            ProviderError: There is no such device.
            TrainingError: The name cannot be used, there is nothing to be patient with, or
                TensorBoard is not installed.
        """
        check_run_name(self.folder.name)
        if self.tensorboard:
            require_tensorboard()
        require_device(self.device)
        if self.patience is not None and self.validation is None:
            raise TrainingError(
                "--patience waits for a better GAP, which takes validation records.",
                hint="Name them with --validation, or leave --patience out.",
            )
        if self.validation is not None:
            check_fits(
                self.training.schema, self.validation.schema, path=self.training.paths[0].parent
            )
        _ = self.taught_by  # whose faults should come before anything is written
        if force:
            return None
        if not self.run.state.exists():
            self.run.refuse_run()
            return None
        with open_tensors(self.run.state) as file:
            record = file.metadata_as(TrainingStateMetadata)
        names = {**self.settings, **record.settings}
        others = [name for name in names if record.settings.get(name) != self.settings.get(name)]
        if others:
            raise OutputError(
                f"{self.folder} holds a run with other values of: {', '.join(others)}.",
                hint="Give this run another --name, or replace the old one with --force.",
            )
        return record


def _describe(records: Records) -> Iterator[str]:
    yield records.schema.model_dump_json()
    yield from (f"{path.name}:{path.stat().st_size}" for path in records.paths)


def _describe_teacher(path: Path | None, share: float) -> str:
    return "none" if path is None else f"{path.name}:{path.stat().st_size}:{share}"


def _hash_of(parts: "Iterator[str] | list[str]") -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
