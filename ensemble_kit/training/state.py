"""The state of a run on disk, from which a run that was killed at any moment resumes.

A checkpoint counts from the moment at which the state is renamed into place, and at no other. All
that a killed process leaves and the state does not know of (lines, checkpoints, half-written files)
is removed before training resumes. No state of a random generator is kept: each step seeds its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import exists
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ensemble_kit._version import __version__
from ensemble_kit.errors import CheckpointError
from ensemble_kit.store.provenance import MeasuredMetadata, TrainingStateMetadata
from ensemble_kit.store.run_log import parse_line
from ensemble_kit.store.tensor_files import open_tensors, save_tensors
from ensemble_kit.store.workspace import RunFolder
from ensemble_kit.training.plan import RunPlan, TrainedRun


@dataclass
class Position:
    """How far a run has come; see ``TrainingStateMetadata`` for the fields."""

    step: int = 0
    batches: int = 0
    examples: int = 0
    seconds: float = 0.0
    measured: list[MeasuredMetadata] = field(default_factory=list)

    @property
    def is_measured(self) -> bool:
        """Whether this step's checkpoint has been written and measured."""
        return bool(self.measured) and self.measured[-1].step == self.step

    @property
    def gaps(self) -> list[float]:
        """The validation GAPs so far, by step."""
        return [checkpoint.gap for checkpoint in self.measured if checkpoint.gap is not None]

    @property
    def num_without_gain(self) -> int:
        """How many checkpoints came after the one with the best GAP."""
        gaps = self.gaps
        return len(gaps) - 1 - gaps.index(max(gaps)) if gaps else 0

    def kept(self, last: int) -> set[int]:
        """Return the steps of the last checkpoints and of the one with the best GAP."""
        steps = {checkpoint.step for checkpoint in self.measured[-last:]}
        for checkpoint in self.measured:
            if checkpoint.gap is not None and checkpoint.gap == self.best_gap:
                return steps | {checkpoint.step}
        return steps

    @property
    def best_gap(self) -> float | None:
        """The best of the GAPs so far, if there is one."""
        return max(self.gaps, default=None)

    def as_run(
        self, plan: RunPlan, *, is_stopped: bool = False, was_finished: bool = False
    ) -> TrainedRun:
        """Return what training has left, once it has come to this position."""
        steps = sorted(self.kept(plan.num_kept))
        return TrainedRun(
            folder=plan.run,
            steps=self.step,
            is_stopped=is_stopped,
            best_gap=self.best_gap,
            seconds=self.seconds,
            checkpoints=tuple(plan.run.checkpoint(step) for step in steps),
            was_finished=was_finished,
        )


def position_of(state: TrainingStateMetadata) -> Position:
    """Return the position that a state holds."""
    return Position(state.step, state.batches, state.examples, state.seconds, list(state.measured))


def save_state(
    plan: RunPlan, position: Position, tensors: Mapping[str, Tensor], *, is_finished: bool = False
) -> None:
    """Write the state of a run; at its start and at its end it needs no tensors.

    Raises:
        OutputError: The disk refuses the file; the previous state is still there.
    """
    metadata = TrainingStateMetadata(
        kit_version=__version__,
        name=plan.run.name,
        settings=dict(plan.settings()),
        modified_ns=plan.modified_ns(),
        is_finished=is_finished,
        step=position.step,
        batches=position.batches,
        examples=position.examples,
        seconds=position.seconds,
        measured=tuple(position.measured),
    )
    save_tensors(plan.run.state, tensors, metadata, force=True)


def read_state(run: RunFolder) -> dict[str, Tensor]:
    """Return the tensors of a run's state."""
    with open_tensors(run.state) as file:
        return dict(file.tensors())


def fitting(
    run: RunFolder, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a state that take the place of others, by name.

    Args:
        run: The run, for the message.
        tensors: Those of its state.
        wanted: The others by the same names, which say of what type and shape each has to be.

    Raises:
        CheckpointError: One is missing, or is of another type or shape.
    """
    for name, like in wanted.items():
        held = tensors.get(name)
        if held is None or (held.dtype, held.shape) != (like.dtype, like.shape):
            raise CheckpointError(
                f"{run.state}: tensor {name} is missing or does not fit the run's recipe.",
                hint="Train the run again with --force; its checkpoints may still be whole.",
            )
    return {name: tensors[name] for name in wanted}


def remove_checkpoints(run: RunFolder, *, but: set[int]) -> None:
    """Remove all checkpoints except those of some steps."""
    kept = {run.checkpoint(step) for step in but}
    for path in run.checkpoints.glob("step-*.safetensors"):
        if path not in kept:
            path.unlink()


def forget_later_files(run: RunFolder, position: Position) -> None:
    """Remove what was written after a run's state: lines, checkpoints, half-written files."""
    remove_checkpoints(run, but={checkpoint.step for checkpoint in position.measured})
    for folder in (run.path, run.checkpoints):
        for path in folder.glob(".*.part"):
            path.unlink()
    _cut_log(run.metrics, position.step)


def _cut_log(path: Path, step: int) -> None:
    """Cut a log off before the first line that is of a later step or is incomplete."""
    if not exists(path):
        return
    length = 0
    with path.open("rb+") as file:
        for line in file:
            parsed = parse_line(line) if line.endswith(b"\n") else None
            if parsed is None or parsed["step"] > step:
                break
            length += len(line)
        file.truncate(length)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what one process draws in one step, such as dropout, from these three numbers alone.

    ``train_checkpoints`` calls this within ``seeded``, which puts the caller's own state back.
    """
    mixed = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))
