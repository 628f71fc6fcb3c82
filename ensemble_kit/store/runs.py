"""The runs of a workspace, from their own files. No tensor is read, and torch is not needed."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path
from typing import Any, Literal

from ensemble_kit.errors import CheckpointError, InputError
from ensemble_kit.store.dtypes import FLOATING
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.run_log import read_metrics
from ensemble_kit.store.tensor_files import STATISTICS, open_tensors
from ensemble_kit.store.workspace import RUNS, RunFolder

State = Literal["running", "stopped", "failed", "finished", "foreign"]


@dataclass(frozen=True)
class RunSummary:
    """The state of a run.

    Attributes:
        name: The run's name.
        state: ``running`` while a process trains it; ``failed`` where the loss was no longer
            finite; ``stopped`` wherever else it was left before its end; ``foreign`` for a model
            that was imported and not trained here.
        recipe: The recipe's name; this and the sizes are None where there is no checkpoint yet.
        steps: Optimisation steps taken, according to the log.
        best_gap: The best validation GAP@20 of any checkpoint; None without validation records.
        averaged_gap: The GAP@20 of the averaged checkpoint; None where there is none.
        parameters: Trainable numbers; of a foreign model, all of its floating-point numbers.
        num_bytes: The size of its averaged checkpoint, or else of its last one; or of the foreign
            model.
    """

    name: str
    state: State
    recipe: str | None
    steps: int
    best_gap: float | None
    averaged_gap: float | None
    parameters: int | None
    num_bytes: int | None


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs of a workspace, by name.

    Args:
        folder: A workspace, or its folder of runs.

    Raises:
        InputError: There are no runs.
    """
    runs = folder / RUNS if isdir(folder / RUNS) else folder
    found = [RunFolder(path) for path in sorted(runs.glob("*")) if isdir(path)]
    summaries = [
        _summarise(run) if exists(run.metrics) else _summarise_foreign(run)
        for run in found
        if exists(run.metrics) or exists(run.foreign)
    ]
    if not summaries:
        raise InputError(
            f"{runs.absolute()} holds no runs.",
            hint="Train some with `ensemble-kit train`, or name a folder of runs.",
        )
    return summaries


def _summarise(run: RunFolder) -> RunSummary:
    lines = read_metrics(run.metrics)
    gaps = [line["validation"]["gap"] for line in lines if "validation" in line]
    recipe, averaged_gap, parameters, num_bytes = None, None, None, None
    # a checkpoint that is damaged, or that training has just removed, says nothing
    with suppress(CheckpointError, OSError):
        path = run.averaged if exists(run.averaged) else run.checkpoint_paths()[-1]
        num_bytes = path.stat().st_size
        with open_tensors(path) as file:
            metadata = file.metadata_as(CheckpointMetadata)
            parameters = sum(
                spec.num_values
                for name, spec in file.specs.items()
                if not name.endswith(STATISTICS)
            )
        recipe, averaged_gap = metadata.recipe.name, metadata.validation_gap
    return RunSummary(
        name=run.path.name,
        state=_state_of(run, lines),
        recipe=recipe,
        steps=lines[-1]["step"] if lines else 0,
        best_gap=max(gaps, default=None),
        averaged_gap=averaged_gap,
        parameters=parameters,
        num_bytes=num_bytes,
    )


def _summarise_foreign(run: RunFolder) -> RunSummary:
    parameters, num_bytes = None, None
    with suppress(CheckpointError, OSError):
        num_bytes = run.foreign.stat().st_size
        with open_tensors(run.foreign) as file:
            specs = file.specs.values()
            parameters = sum(spec.num_values for spec in specs if spec.dtype in FLOATING)
    return RunSummary(
        name=run.path.name,
        state="foreign",
        recipe=None,
        steps=0,
        best_gap=None,
        averaged_gap=None,
        parameters=parameters,
        num_bytes=num_bytes,
    )


def _state_of(run: RunFolder, lines: Sequence[Mapping[str, Any]]) -> State:
    if run.is_locked():
        return "running"
    last = lines[-1].get("state") if lines else None
    return last if last in ("failed", "finished") else "stopped"
