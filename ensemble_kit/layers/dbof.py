"""Deep bag of frames: arXiv:1609.08675; S1, section 3.2 and table 3."""

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from ensemble_kit.layers.max_pooling import max_over_drawn
from ensemble_kit.layers.normalisation import BatchNorm

ACTIVATIONS = {"relu": torch.relu, "relu6": nn.functional.relu6, "sigmoid": torch.sigmoid}


class DBoF(nn.Module):
    """Project each frame to K units and pool each unit over the frames.

    ::

        a_t = act(BN(x_t W)),    output = max_t a_t    or    sum_t w_t a_t / sum_t w_t

    W starts as N(0, 1 / sqrt(D)). The code is google/youtube-8m, ``DbofModel``; its second
    projection is the recipe's hidden layer here.

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K, the number of units.
        activation: ``relu6`` (the starter code of 2017 and 2018), ``relu`` (S1) or ``sigmoid``
            (the starter code since 2019).
        over_frames: ``max`` or ``average``.
        momentum: The momentum of the batch norm's running statistics.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, K)``; zeros for a video of no frames.
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_clusters: int,
        activation: Literal["relu", "relu6", "sigmoid"],
        over_frames: Literal["max", "average"],
        momentum: float,
    ) -> None:
        super().__init__()
        self.output_size = num_clusters
        self.projection_fan_in = num_clusters
        self.activation = ACTIVATIONS[activation]
        self.over_frames = over_frames
        self.loops_over_repeats = over_frames == "max"
        self.weight = nn.Parameter(torch.randn(num_features, num_clusters) / sqrt(num_features))
        self.batch_norm = BatchNorm(num_features=num_clusters, momentum=momentum)

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return every frame's activations ``(B, T, K)``."""
        logits = self.batch_norm.of_product(frames, self.weight, row_weights)
        return (self.activation(logits),)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return the pooled activations of each repeat."""
        (activations,) = described
        if self.over_frames == "max":
            return max_over_drawn(activations, frame_weights)
        weights = frame_weights.to(activations.dtype)
        return weights @ activations / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)
