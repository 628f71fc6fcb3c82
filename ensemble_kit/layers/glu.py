"""Gated linear unit: Dauphin et al. (2017), compared in table 2 of arXiv:1706.06905."""

from math import sqrt

import torch
from torch import Tensor, nn


class GLU(nn.Module):
    """Gate one linear map of a vector by another: ``y = sigmoid(x W1 + b1) * (x W2 + b2)``.

    Both matrices start as N(0, 1 / sqrt(F)), as in context gating; biases start at 0.

    Args:
        num_features: F, the size of the vector.

    Shape:
        - features: ``(..., F)``, floating point.
        - output: as ``features``.
    """

    def __init__(self, *, num_features: int) -> None:
        super().__init__()
        shape, deviation = (num_features, num_features), 1 / sqrt(num_features)
        self.gate = nn.Parameter(torch.randn(shape) * deviation)
        self.gate_bias = nn.Parameter(torch.zeros(num_features))
        self.value = nn.Parameter(torch.randn(shape) * deviation)
        self.value_bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """Return the gated map."""
        gate = (features @ self.gate + self.gate_bias).sigmoid()
        return gate * (features @ self.value + self.value_bias)
