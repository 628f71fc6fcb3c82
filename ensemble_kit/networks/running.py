"""Run a model on batches of records."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_kit.choices import BATCH_SIZE, TOP_K
from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.errors import ProviderError
from ensemble_kit.metrics import Metrics, MetricsAccumulator
from ensemble_kit.predictions.rows import as_probabilities


def require_device(device: str) -> None:
    """Raise ``ProviderError`` unless PyTorch can run on a device, ``cpu`` or ``cuda``."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError(
            "PyTorch finds no CUDA device.",
            hint="Use --device cpu, or install a driver and a PyTorch built for CUDA.",
        )


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Seed PyTorch's random numbers for a block, and put the caller's own back after it.

    Args:
        seed: The seed, for the CPU and for ``device``.
        device: ``cpu`` or ``cuda``.
    """
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def to_torch(batch: Batch, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch's frames and frame counts as tensors on a device."""
    frames = {name: torch.from_numpy(values).to(device) for name, values in batch.frames.items()}
    return frames, torch.from_numpy(batch.num_frames).to(device)


def refuse_nothing(batch: Batch) -> None:
    """Raise ``ValueError`` for a batch of no videos or no frames.

    ONNX Runtime's recurrent operators, which foreign models may have, end the process on one.
    """
    for name, frames in batch.frames.items():
        for size, noun in zip(frames.shape, ("videos", "frames"), strict=False):
            if size < 1:
                raise ValueError(f"frames[{name!r}] holds 0 {noun}; at least 1 is needed")


def runner(
    model: Callable[..., Tensor], draws: Tensor | None, device: str
) -> Callable[[Batch], np.ndarray[Any, Any]]:
    """Return a function from a batch of records to probabilities ``(B, C)``, float32.

    Args:
        model: A member or an ensemble, in evaluation mode, on ``device``.
        draws: A sub-model's uniform numbers ``(R, N)``, or None.
        device: ``cpu`` or ``cuda``.
    """
    extra = () if draws is None else (draws.to(device),)

    @torch.inference_mode()
    def run(batch: Batch) -> np.ndarray[Any, Any]:
        refuse_nothing(batch)
        probabilities: Tensor = model(*to_torch(batch, device), *extra)
        return probabilities.float().cpu().numpy()

    return run


def measure(
    run: Callable[[Batch], np.ndarray[Any, Any]],
    records: Records,
    *,
    k: int = TOP_K,
    source: Path | str = "the model",
) -> Metrics:
    """Return the metrics of a model on records; equal probabilities keep the records' order.

    Args:
        run: Returns the probabilities of a batch, ``(B, C)``.
        records: The records.
        k: The k of GAP@k.
        source: What messages call the model.

    Raises:
        PredictionsError: The model returns what is no probability, such as NaN.
    """
    accumulator = MetricsAccumulator(num_classes=records.schema.num_classes, k=k)
    for batch in records.batches(BATCH_SIZE):
        probabilities = as_probabilities(run(batch), batch.ids, source)
        accumulator.add(probabilities, batch.labels)
    return accumulator.result()
