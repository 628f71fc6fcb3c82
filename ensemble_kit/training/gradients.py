"""The loss of a batch and its gradients."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ensemble_kit.data.dataset import Batch
from ensemble_kit.layers.precision import at_least_float32
from ensemble_kit.networks.building import TrainedModel
from ensemble_kit.training.loss import cross_entropy
from ensemble_kit.training.mixing import mixed_up, smoothed
from ensemble_kit.training.plan import RunPlan
from ensemble_kit.training.processes import Processes


class Part(NamedTuple):
    """A part of a batch, on the device.

    Attributes:
        frames: ``(B, T, D)`` for each modality.
        num_frames: ``(B,)``, int64.
        frame_weights: ``(B, T)``, float32, or None.
        targets: ``(B, C)``: the labels, bool; float32 where they are mixed with a teacher's
            probabilities, with another video's, or smoothed.
    """

    frames: dict[str, Tensor]
    num_frames: Tensor
    frame_weights: Tensor | None
    targets: Tensor


class Differentiator:
    """Adds the gradients of the loss to the parameters; they are the same in every process.

    Args:
        plan: The run.
        model: The model that is trained.
        processes: The processes that train it; each has a share of every batch.
    """

    def __init__(self, plan: RunPlan, model: TrainedModel, processes: Processes) -> None:
        self._plan = plan
        self._model = model
        self._processes = processes
        self._teacher = plan.open_teacher()
        self._joined: DistributedDataParallel | None = None
        if processes.count > 1:
            processes.synchronise(model)
            self._joined = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        forward = self._joined or model
        self._forward = torch.compile(forward) if plan.compiled else forward

    def __call__(self, batch: Batch, counts: Sequence[float]) -> float:
        """Add the gradients of a batch's loss; return the loss without its penalties.

        Args:
            batch: This process's share of the batch.
            counts: How many videos each process has; every process has at least one.
        """
        # DistributedDataParallel takes the mean of the processes' gradients. Scaled by this, each
        # video counts the same, however the videos are shared out.
        each = self._processes.count / sum(counts)
        penalty = sum(kernel.square().sum() for kernel in self._model.regularised())
        total = 0.5 * self._plan.recipe.training.l2_penalty * penalty
        losses = []
        num_parts = min(self._plan.accumulate, *map(int, counts))
        targets: np.ndarray[Any, Any] = batch.labels.dense(self._model.schema.num_classes)
        if self._teacher is not None:
            targets = self._teacher.mixed(batch.ids, targets)
        parts = parts_of(batch, targets, num_parts, self._plan.device)
        for number, part in enumerate(map(self._mixed, parts), start=1):
            share = each * len(part.targets)
            with self._in_step(is_last=number == num_parts):
                probabilities = self._probabilities(part)
                loss = share * cross_entropy(probabilities, part.targets.to(probabilities.dtype))
                losses.append(loss.detach())
                total = total + loss
                if (distance := self._model.penalty()) is not None:
                    total = total + share * distance
                total.backward()  # type: ignore[no-untyped-call]
            total = torch.zeros_like(loss)
        own = float(torch.stack(losses).sum())
        return sum(self._processes.gather_number(own)) / self._processes.count

    def _mixed(self, part: Part) -> Part:
        """Return a part with what the recipe does to targets and frames."""
        schedule, targets, frames = self._plan.recipe.training, part.targets, part.frames
        if schedule.label_smoothing is not None:
            targets = smoothed(targets.float(), schedule.label_smoothing)
        if schedule.mixup is not None:
            frames, targets = mixed_up(frames, part.num_frames, targets.float(), schedule.mixup)
        return part._replace(frames=frames, targets=targets)

    def _probabilities(self, part: Part) -> Tensor:
        is_rounded = self._plan.precision == "bf16"
        with torch.autocast(self._plan.device, torch.bfloat16, enabled=is_rounded):
            probabilities: Tensor = self._forward(
                part.frames, part.num_frames, frame_weights=part.frame_weights
            )
        return at_least_float32(probabilities)

    def _in_step(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return a context in which only a batch's last part joins the processes' gradients."""
        if is_last or self._joined is None:
            return nullcontext()
        return self._joined.no_sync()


def parts_of(
    batch: Batch, targets: "np.ndarray[Any, Any]", num_parts: int, device: str
) -> Iterator[Part]:
    """Yield a batch on a device, in parts of nearly equal size, the larger ones first."""
    for rows in np.array_split(np.arange(len(batch.ids)), num_parts):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        weights = batch.frame_weights
        yield Part(
            {name: _on(values[start:stop], device) for name, values in batch.frames.items()},
            _on(batch.num_frames[start:stop], device),
            None if weights is None else _on(weights[start:stop], device),
            _on(targets[start:stop], device),
        )


def _on(values: "np.ndarray[Any, Any]", device: str) -> Tensor:
    return torch.from_numpy(values).to(device)
