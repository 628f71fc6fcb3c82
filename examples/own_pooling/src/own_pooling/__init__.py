"""Smooth-maximum pooling, as a part that ensemble-kit finds by its entry point."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.parts import BatchNorm, PartError, PerModality, PoolingTable


class SmoothMaximum(nn.Module):
    """Pool each of K units over the frames, between their mean and their maximum.

    ::

        y_t = sigmoid(BN(x_t W)),    z = 1/r log( sum_t w_t exp(r y_t) / sum_t w_t )

    The log-sum-exp of Pinheiro and Collobert (arXiv:1411.6228, section 3.2) on units that lie in
    [0, 1]; near r = 0 it is the mean, for a large r the maximum.

    Args:
        num_features: D, the size of one frame's feature vector.
        momentum: The momentum of the batch norm's running statistics.
        num_units: K.
        sharpness: r, in (0, 50].

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, K)`` in [0, 1]; zeros for a video of no frames.
    """

    class Table(PoolingTable):
        """What recipes say of it."""

        num_units: PerModality
        sharpness: float = 10.0

    loops_over_repeats = False

    def __init__(
        self, *, num_features: int, momentum: float, num_units: int, sharpness: float
    ) -> None:
        super().__init__()
        if not 0 < sharpness <= 50:  # e^50 is still a float32
            raise PartError("sharpness", "it has to lie in (0, 50]", advice="10.0")
        self.output_size = num_units
        self.projection_fan_in = num_units
        self.sharpness = sharpness
        self.weight = nn.Parameter(torch.randn(num_features, num_units) / sqrt(num_features))
        self.batch_norm = BatchNorm(num_features=num_units, momentum=momentum)

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return ``exp(r y)`` of each frame, ``(B, T, K)``."""
        units = self.batch_norm(frames @ self.weight, row_weights).sigmoid()
        return ((self.sharpness * units).exp(),)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return the smooth maximum of each repeat."""
        (powers,) = described
        weights = frame_weights.to(powers.dtype)
        count = weights.sum(dim=-1, keepdim=True)
        mean = weights @ powers / count.clamp_min(1)
        return torch.where(count > 0, mean, 1.0).log() / self.sharpness
