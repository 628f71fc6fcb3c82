"""A run to be trained: its recipe, its records and its options, and the state its folder holds."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from os.path import exists
from pathlib import Path
from typing import Any, get_args

import torch

from ensemble_kit.choices import (
    ACCUMULATE,
    DEVICE,
    PRECISION,
    SEED,
    TEACHER_SHARE,
    WORKERS,
    AnyPath,
    Device,
    Precision,
    Tracker,
)
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import check_fits
from ensemble_kit.errors import OutputError, TrainingError
from ensemble_kit.files import sha256_of
from ensemble_kit.interrupts import require_process_groups
from ensemble_kit.networks.building import build_model
from ensemble_kit.networks.running import require_device
from ensemble_kit.recipes.reading import AnyRecipe
from ensemble_kit.store.provenance import TrainingStateMetadata
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.trackers import require_trackers
from ensemble_kit.store.workspace import RunFolder, check_run_name
from ensemble_kit.training.optimisation import rate_factors
from ensemble_kit.training.teacher import Teacher


@dataclass(frozen=True)
class TrainedRun:
    """What training has left in a run's folder.

    Attributes:
        folder: The run's folder.
        steps: Optimisation steps taken.
        is_stopped: Whether a signal interrupted it before its last step.
        best_gap: The best validation GAP@20 of any checkpoint; None without validation records.
        seconds: How long training took, including the time before an interruption.
        checkpoints: The checkpoints that training keeps, by step.
        was_finished: Whether the run was finished before, so that nothing was left to do.
    """

    folder: RunFolder
    steps: int
    is_stopped: bool
    best_gap: float | None
    seconds: float
    checkpoints: tuple[Path, ...] = ()
    was_finished: bool = False


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run to be trained. Its options are checked once, when the plan is made.

    Attributes:
        recipe: What to train, and for how many steps.
        training: The records to learn from.
        validation: The records that each checkpoint's GAP@20 is measured on, or None.
        folder: The run's folder; the last part of its path is the run's name.
        seed: Seeds the initial parameters, the order of the videos and the frames drawn.
        workers: Processes that read the training records ahead; 0 reads in this one. The weights
            are the same for any number.
        device: ``cpu`` or ``cuda``.
        trackers: What is given the numbers of the log too: ``tensorboard``, ``mlflow``, ``wandb``.
        ema: The decay, in [0, 1), of an exponential moving average of the weights, which is then
            kept beside them.
        patience: How many checkpoints in a row without a better GAP@20 end the run; None trains
            for all of the recipe's ``max_steps``.
        keep: How many of the last checkpoints are kept, beside the best one. At least as many as
            the recipe averages are kept, which is also what None means.
        precision: ``bf16`` multiplies in bfloat16 (autocast) and keeps weights, statistics, heads
            and the loss in float32.
        compiled: Whether ``torch.compile`` compiles the model.
        accumulate: How many parts each batch is split into where memory is short; their gradients
            are added up. Batch norm then sees one part at a time.
        teacher: A predictions file of the training records, which the sub-model learns from too.
        teacher_share: The teacher's share of the targets, in [0, 1]; the labels have the rest.

    Raises:
        InputError: There are ``workers`` on a system without groups of processes.
        PredictionsError: The training records, the validation records and the teacher do not
            belong together.
        ProviderError: There is no such device.
        RecipeError: The recipe does not fit the records.
        TrainingError: The folder's name cannot name a run, ``patience`` has no GAP to wait for,
            or a tracker is not installed.
        ValueError: An option is out of its range.
    """

    recipe: AnyRecipe
    training: Records
    validation: Records | None = None
    folder: AnyPath
    seed: int = SEED
    workers: int = WORKERS
    device: Device = DEVICE
    trackers: Sequence[Tracker] = ()
    ema: float | None = None
    patience: int | None = None
    keep: int | None = None
    precision: Precision = PRECISION
    compiled: bool = False
    accumulate: int = ACCUMULATE
    teacher: AnyPath | None = None
    teacher_share: float = TEACHER_SHARE

    def __post_init__(self) -> None:
        """Check every option, before anything is written and before hours are spent."""
        self._refuse_out_of_range()
        check_run_name(self.run.name)
        require_trackers(self.trackers)
        require_device(self.device)
        if self.workers:
            require_process_groups("--workers")
        if self.patience is not None and self.validation is None:
            raise TrainingError(
                "--patience waits for a better GAP@20, which needs validation records.",
                hint="Name them with --validation, or leave --patience out.",
            )
        if self.validation is not None:
            check_fits(
                self.training.schema, self.validation.schema, path=self.training.paths[0].parent
            )
        self.open_teacher()  # a teacher that cannot be used is refused here too
        with torch.device("meta"):  # the parts meet their widths, and no memory is taken
            model = build_model(self.recipe, self.training.schema)
        rate_factors(model, self.recipe.training)

    def _refuse_out_of_range(self) -> None:
        for name, value, low, high in (
            ("seed", self.seed, 0, None),
            ("workers", self.workers, 0, None),
            ("patience", self.patience, 1, None),
            ("keep", self.keep, 1, None),
            ("accumulate", self.accumulate, 1, None),
            ("teacher_share", self.teacher_share, 0, 1),
            ("ema", self.ema, 0, 1),
        ):
            if value is not None and (value < low or (high is not None and value > high)):
                limits = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} is {value}; it has to be {limits}")
        if self.ema == 1:
            raise ValueError("ema is 1; such an average would never move")
        for name, choice, choices in (
            ("device", self.device, get_args(Device)),
            ("precision", self.precision, get_args(Precision)),
            *(("trackers", tracker, get_args(Tracker)) for tracker in self.trackers),
        ):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}; it has to be one of {choices}")

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.folder))

    def settings(self) -> Mapping[str, str]:
        """Return what makes the run what it is, by the names that a message gives these settings.

        Records and the teacher count by their content: a run whose records have changed since is
        another run, even where names and sizes are the same. The files are read once.
        """
        return self._settings

    @cached_property
    def _settings(self) -> Mapping[str, str]:
        return {
            "recipe": _hash_of([self.recipe.model_dump_json()]),
            "seed": str(self.seed),
            "training records": _hash_of(_describe(self.training)),
            "validation records": _hash_of(_describe(self.validation) if self.validation else []),
            "--ema": str(self.ema),
            "--accumulate": str(self.accumulate),
            "--teacher": self._describe_teacher(),
        }

    def described(self) -> Mapping[str, str]:
        """Return the recipe's values and the seed as trackers show them, by their keys."""
        values = self.recipe.model_dump(exclude={"source", "reported"}, exclude_none=True)
        return {"recipe": self.recipe.name, "seed": str(self.seed), **dict(_flat(values))}

    def _describe_teacher(self) -> str:
        if self.teacher is None:
            return "none"
        return f"{sha256_of(Path(self.teacher))}:{self.teacher_share}"

    def open_teacher(self) -> Teacher | None:
        """Open the teacher's predictions; see ``Teacher`` for what it raises."""
        if self.teacher is None:
            return None
        return Teacher(Path(self.teacher), self.teacher_share, self.training.schema)

    @property
    def num_kept(self) -> int:
        """How many of the last checkpoints are kept."""
        return max(self.keep or 0, self.recipe.training.average_last)

    def identity(self) -> str:
        """Return a hash of the settings, which only the run's own checkpoints share."""
        return _hash_of(f"{name}: {value}" for name, value in self.settings().items())

    def modified_ns(self) -> tuple[int, ...]:
        """Return when each file of training, then of validation records was last modified."""
        return tuple(
            fingerprint.modified_ns
            for records in self._records
            for fingerprint in records.fingerprints()
        )

    @property
    def _records(self) -> list[Records]:
        return [self.training, *filter(None, [self.validation])]

    def _find_damaged(self, before: Sequence[int]) -> list[str]:
        """Return the settings whose records hold payloads that no longer match their checksums.

        The settings hash checksums as the files hold them, which needs no payload to be read. Only
        files that were modified since the state was written are read whole.
        """
        paths = [(records, path) for records in self._records for path in records.paths]
        changed = [
            (records, path)
            for (records, path), then, now in zip_longest(
                paths, before[: len(paths)], self.modified_ns()
            )
            if then != now
        ]
        damaged = [records for records, path in changed if not records.is_whole(path)]
        names = {id(self.training): "training records", id(self.validation): "validation records"}
        return sorted({names[id(records)] for records in damaged})

    def find_state(self, *, force: bool) -> TrainingStateMetadata | None:
        """Return the state that the run was left in, or None where it has to begin.

        Args:
            force: Whether a run that the folder holds will be replaced.

        Raises:
            OutputError: The folder holds another run and ``force`` is False.
            CheckpointError: The run's state is damaged.
        """
        if force:
            return None
        if not exists(self.run.state):
            self.run.refuse_run()
            return None
        with open_tensors(self.run.state) as file:
            state = file.metadata_as(TrainingStateMetadata)
        names = {**self.settings(), **state.settings}
        others = [name for name in names if state.settings.get(name) != self.settings().get(name)]
        others = others or self._find_damaged(state.modified_ns)
        if others:
            raise OutputError(
                f"{self.folder} holds a run with other values of: {', '.join(others)}.",
                hint="Give this run another --name, or replace the old one with --force.",
            )
        return state


def _describe(records: Records) -> Iterator[str]:
    yield records.schema.model_dump_json()
    if records.part is not None:
        yield str(records.part)
    for path, fingerprint in zip(records.paths, records.fingerprints(), strict=True):
        yield f"{path.name}:{fingerprint.content}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a recipe's values with their keys, such as ``training.batch_size``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


def _hash_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
