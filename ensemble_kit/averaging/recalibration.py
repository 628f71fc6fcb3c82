"""Estimate batch-norm statistics again, for averaged weights: arXiv:1803.05407, section 3.2."""

import torch

from ensemble_kit.choices import DEVICE
from ensemble_kit.data.dataset import Records
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import WhitenedResiduals
from ensemble_kit.networks.running import seeded, to_torch

BATCH_SIZE = 256


@torch.no_grad()
def recalibrate(
    model: torch.nn.Module,
    records: Records,
    *,
    num_videos: int,
    device: str = DEVICE,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Estimate the statistics of every batch norm and whitening again.

    The first videos in training order are run. Each layer's running statistics become the mean of
    those of the batches, each batch counting the same, as in arXiv:1803.05407, section 3.2. The
    weights stay as they are, and only layers with statistics run as in training: dropout would
    widen what the layers after it see.

    Args:
        model: The model, on ``device``.
        records: Training records.
        num_videos: How many videos to run, or all if there are fewer.
        device: ``cpu`` or ``cuda``.
        batch_size: Videos of a batch.
    """
    layers = [part for part in model.modules() if isinstance(part, (BatchNorm, WhitenedResiduals))]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_statistics()
        layer.momentum = None
        layer.train()
    seen = 0
    with seeded(0, device):  # random sampling draws the same frames for the same files
        for batch in records.training_batches(batch_size, seed=0, epochs=1):
            if batch.ids:  # otherwise every record of it was bad and skipped
                model(*to_torch(batch, device))
            seen += len(batch.ids)
            if seen >= num_videos:
                break
    model.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
