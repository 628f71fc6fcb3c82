"""Where files lie in a workspace folder."""

import fnmatch
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path
from typing import TextIO

from ensemble_kit.choices import Dtype
from ensemble_kit.data.folds import Fold
from ensemble_kit.errors import CheckpointError, OutputError, TrainingError
from ensemble_kit.store.dtypes import DTYPES

RUN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
RUNS = Path("runs")
SELECTION = Path("ensemble") / "selection.json"
FUSED = Path("ensemble") / "fused.safetensors"
ONNX = Path("ensemble") / "ensemble.onnx"
REPORT = Path("ensemble") / "report.html"
LONGEST_RUN_NAME = 200  # what is made of it may have 255 bytes


def validation_name(dtype: Dtype | None) -> str:
    """Return the name of a run's validation predictions in a precision; None as it was trained."""
    return "validation.safetensors" if dtype is None else f"validation-{dtype}.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run, ``runs/<name>``."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name, the last part of the folder's path."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, ``step-*.safetensors``."""
        return self.path / "checkpoints"

    @property
    def state(self) -> Path:
        """The file that training resumes from."""
        return self.path / "state.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: losses, learning rates, validation GAPs."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of the same for TensorBoard, where it was asked for."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """The folder of what Weights & Biases has on disk, where it was asked for."""
        return self.path / "wandb"

    @property
    def trackers(self) -> Path:
        """The names by which trackers know the run, as JSON."""
        return self.path / "trackers.json"

    @property
    def ema(self) -> Path:
        """The exponential moving average that training kept, where it was asked to."""
        return self.path / "ema.safetensors"

    @property
    def averaged(self) -> Path:
        """The averaged checkpoint."""
        return self.path / "averaged.safetensors"

    @property
    def foreign(self) -> Path:
        """The model that another framework made, where it was imported as this run."""
        return self.path / "foreign.safetensors"

    @property
    def validation(self) -> Path:
        """The averaged checkpoint's predictions on the validation records."""
        return self.path / validation_name(None)

    def validation_in(self, dtype: Dtype) -> Path:
        """The same of its weights rounded to a precision."""
        return self.path / validation_name(dtype)

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of one step; names sort by step."""
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def checkpoint_paths(self) -> list[Path]:
        """Return the checkpoints there are, by step.

        Raises:
            CheckpointError: There are none, or the folder cannot be read.
        """
        try:  # glob would say of a folder that may not be read that it is empty
            names = os.listdir(self.checkpoints)
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            raise CheckpointError(
                f"{self.checkpoints} cannot be read: {error.strerror}.",
                hint="Name the folder of a run that you may read.",
            ) from error
        kept = sorted(fnmatch.filter(names, "step-*.safetensors"))
        paths = [self.checkpoints / name for name in kept]
        if not paths:
            raise CheckpointError(
                f"{self.path} holds no checkpoints (checkpoints/step-*.safetensors).",
                hint="Name the folder of a run that `ensemble-kit train` has made.",
            )
        return paths

    @property
    def lock(self) -> Path:
        """The file that a process keeps locked as long as it trains the run."""
        return self.path / ".lock"

    def is_locked(self) -> bool:
        """Return whether a process trains the run; False where the system knows no locks."""
        try:
            with self.lock.open() as file:
                _lock(file)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def refuse_run(self) -> None:
        """Raise ``OutputError`` if the folder holds a run already."""
        if existing := self._outputs():
            raise OutputError(
                f"{self.path} holds a run already ({existing[0].name}).",
                hint="Give this run another --name, or replace the old one with --force.",
            )

    def claim(self, *, force: bool) -> None:
        """Make way for a new run.

        Raises:
            OutputError: It holds a run already and ``force`` is False.
        """
        if not force:
            self.refuse_run()
        for path in self._outputs():
            shutil.rmtree(path) if isdir(path) else path.unlink()

    @contextmanager
    def locked(self) -> Iterator["RunLock"]:
        """Keep this run from being trained by two processes; the folder is made if it is missing.

        Where the system or the disk knows no locks, nothing keeps another process away. What is
        made for the lock is removed again if nothing else was written meanwhile, as where a recipe
        is refused.

        Raises:
            OutputError: The folder cannot be made.
            TrainingError: Another process has locked it.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not exists(folder)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            before = set(os.listdir(self.path))
            file = self.lock.open("a")
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}.",
                hint="Name a folder you may write to.",
            ) from error
        with file:
            try:
                _lock(file)
            except BlockingIOError as error:
                raise TrainingError(
                    f"{self.path} is being trained by another process.",
                    hint="Wait until that one ends, or give this run another --name.",
                ) from error
            lock = RunLock(self, file)
            try:
                yield lock
            finally:
                if lock.is_there() and set(os.listdir(self.path)) - before == {self.lock.name}:
                    self._forget_lock(made)

    def _forget_lock(self, made: Sequence[Path]) -> None:
        """Remove the lock, and the folders that were made for it."""
        with suppress(OSError):  # another process writes into one of them
            self.lock.unlink()
            for folder in made:
                folder.rmdir()

    def _outputs(self) -> list[Path]:
        outputs = (self.state, self.checkpoints, self.metrics, self.tensorboard, self.wandb,
                   self.trackers, self.ema, self.averaged, self.validation,
                   *map(self.validation_in, DTYPES))  # fmt: skip
        return [path for path in outputs if exists(path)]


@dataclass(frozen=True)
class RunLock:
    """A run's folder for as long as this process alone may write to it.

    Attributes:
        run: The folder.
        file: The locked file in it, open.
    """

    run: RunFolder
    file: TextIO

    def is_there(self) -> bool:
        """Return whether the folder is still the one that was locked."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.run.lock.stat())
        except OSError:
            return False

    def require_folder(self) -> None:
        """Raise ``TrainingError`` if the folder is no longer the one that was locked.

        Writing would make the folder again, without the checkpoints and the log that it held.
        """
        if not self.is_there():
            raise TrainingError(
                f"{self.run.path} was removed or replaced while it was being trained.",
                hint="Give the same command again, and leave the folder in place until it ends.",
            )


def _lock(file: TextIO) -> None:
    """Lock a file until it is closed or its process ends, however that comes about."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a network's disk without locks
        return


def run_name(recipe_name: str) -> str:
    """Return the name that a recipe's run has unless it is given one: ``willow-gru``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", recipe_name)


def fold_run_name(name: str, fold: Fold) -> str:
    """Return the name of the run that holds out a fold: ``willow-gru-fold-2-of-5``."""
    return f"{name}-fold-{fold.number}-of-{fold.of}"


def check_run_name(name: str) -> None:
    """Raise ``TrainingError`` unless a name can name a folder and the nodes of a graph."""
    if len(name) > LONGEST_RUN_NAME or not re.fullmatch(RUN_NAME, name):
        shown = name if len(name) <= LONGEST_RUN_NAME else f"{name[:20]}..."
        raise TrainingError(
            f"{shown!r} cannot name a run.",
            hint=f"Use at most {LONGEST_RUN_NAME} letters, digits, _ and -, and do not begin "
            "with -.",
        )
