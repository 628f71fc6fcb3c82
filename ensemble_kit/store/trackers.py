"""Trackers: TensorBoard, MLflow and Weights & Biases, which draw what a run's log says.

A tracker is given the numbers that ``metrics.jsonl`` has. One that cannot be opened is an error
before the first step. One that fails later is left out from then on, with a warning: the file has
every line, and hours of training are not lost because a server is down.
"""

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from os.path import isfile
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from ensemble_kit.choices import Tracker
from ensemble_kit.errors import TrainingError
from ensemble_kit.files import written_aside
from ensemble_kit.store.workspace import RunFolder
from ensemble_kit.texts import parse_json

LOGGER = logging.getLogger(__name__)


class TrackedRun(NamedTuple):
    """A run as a tracker is told of it.

    Attributes:
        folder: The run's folder.
        settings: What the run was asked for, such as ``training.batch_size``: ``80``.
        after_step: The last step that its log has already.
        known_as: The tracker's own name of the run, if it was opened before.
    """

    folder: RunFolder
    settings: Mapping[str, str]
    after_step: int
    known_as: str | None


class OpenTracker(Protocol):
    """What is given a run's numbers while it is trained."""

    @property
    def known_as(self) -> str | None:
        """The tracker's own name of the run, if it needs one to go on with it."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one optimisation step, as ``validation/gap``: 0.8."""

    def close(self) -> None:
        """Pass on what was written, and end the run."""


class TensorBoard:
    """Event files in the run's folder."""

    known_as = None

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # later steps are taken again, and would be there twice
        self._events = SummaryWriter(run.folder.tensorboard, purge_step=run.after_step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write an event for each number."""
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._events.close()


class MLflow:
    """A run where MLflow's own variables say: ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``.

    MLflow keeps every value it is given: those of steps that a resumed run takes again, twice.
    """

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        is_inside = mlflow.active_run() is not None  # one that the calling program has begun
        name = run.folder.name
        started = mlflow.start_run(run_id=run.known_as, run_name=name, nested=is_inside)
        self.known_as = started.info.run_id
        if run.known_as is None:
            mlflow.log_params(dict(run.settings))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers in one request."""
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        """Say that the run has ended."""
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run where its own variables say: ``WANDB_PROJECT``, ``WANDB_MODE=offline``.

    Steps that a resumed run takes again are kept as they were logged first.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.known_as = run.known_as or secrets.token_hex(4)
        self._run = wandb.init(
            id=self.known_as,
            resume="allow",
            name=run.folder.name,
            dir=run.folder.path,
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off"),  # stderr has the kit's progress
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers as those of their step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Wait until everything was sent or, offline, is on disk."""
        self._run.finish()


class _Library(NamedTuple):
    """Where a tracker comes from.

    Attributes:
        title: The tracker's name.
        module: What is imported where it is installed.
        open: Makes it.
        check: What to look at where it cannot be opened.
    """

    title: str
    module: str
    open: Callable[[TrackedRun], OpenTracker]
    check: str


LIBRARIES: Mapping[Tracker, _Library] = MappingProxyType(
    {
        "tensorboard": _Library(
            "TensorBoard", "torch.utils.tensorboard", TensorBoard,
            "Free the run's folder of what is in the way",
        ),
        "mlflow": _Library(
            "MLflow", "mlflow", MLflow,
            "Set MLFLOW_TRACKING_URI to a server that runs, or `pip install mlflow` for a local "
            "database",
        ),
        "wandb": _Library(
            "Weights & Biases", "wandb", WeightsAndBiases,
            "Run `wandb login`, or set WANDB_MODE=offline",
        ),
    }
)  # fmt: skip


def require_trackers(trackers: Iterable[Tracker]) -> None:
    """Raise ``TrainingError`` unless the library of each tracker is installed."""
    for name in trackers:
        library = LIBRARIES[name]
        try:
            import_module(library.module)
        except ImportError as error:
            raise TrainingError(
                f"{library.title} is not installed.",
                hint=f"Run `pip install 'ensemble-kit[{name}]'`, or leave --tracker {name} out.",
            ) from error


def open_trackers(
    trackers: Iterable[Tracker], run: RunFolder, settings: Mapping[str, str], *, after_step: int
) -> Sequence[OpenTracker]:
    """Open a run in each tracker: the one that it had there before, if there was one.

    Args:
        trackers: The trackers.
        run: The run's folder, which keeps by what names they know it.
        settings: What they are to say of the run.
        after_step: The last step that the log has already.

    Raises:
        TrainingError: A tracker is not installed, or cannot be opened.
    """
    names = list(dict.fromkeys(trackers))
    require_trackers(names)
    known = _read_names(run.trackers)
    opened = []
    with ExitStack() as stack:  # closes those that are open if another cannot be opened
        for name in names:
            tracker = _open(name, TrackedRun(run, settings, after_step, known.get(name)))
            stack.callback(tracker.close)
            opened.append(_LeftOutWhereItFails(tracker))
            if tracker.known_as is not None:
                known[name] = tracker.known_as
        if known:
            with written_aside(run.trackers, force=True) as aside:
                aside.write_text(json.dumps(known) + "\n", encoding="utf-8")
        stack.pop_all()
    return opened


def _open(name: Tracker, run: TrackedRun) -> OpenTracker:
    library = LIBRARIES[name]
    try:
        return library.open(run)
    except Exception as error:  # whatever its library, its server or the network raises
        raise TrainingError(
            f"{library.title} cannot be opened: {_first_line(error)}.",
            hint=f"{library.check}, or leave --tracker {name} out.",
        ) from error


def _read_names(path: Path) -> dict[str, str]:
    """Return the names of a run by tracker; none from a file that is damaged or absent."""
    with suppress(OSError, ValueError):
        names = parse_json(path.read_bytes()) if isfile(path) else {}
        if isinstance(names, dict):
            return {key: name for key, name in names.items() if isinstance(name, str)}
    return {}


class _LeftOutWhereItFails:
    """A tracker that fails once, with a warning, and takes nothing after that."""

    def __init__(self, tracker: OpenTracker) -> None:
        self.known_as = tracker.known_as
        self._tracker: OpenTracker | None = tracker

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._tracker is not None:
            self._try(lambda tracker: tracker.write(step, numbers))

    def close(self) -> None:
        if self._tracker is not None:
            self._try(lambda tracker: tracker.close())

    def _try(self, does: Callable[[OpenTracker], None]) -> None:
        assert self._tracker is not None
        try:
            does(self._tracker)
        except Exception as error:  # whatever its library, its server or the network raises
            LOGGER.warning(
                "%s failed and is left out from here on; metrics.jsonl has every line: %s",
                type(self._tracker).__name__, _first_line(error),
            )  # fmt: skip
            self._tracker = None


def _first_line(error: Exception) -> str:
    """Return an error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
