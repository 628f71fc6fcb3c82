"""The linear layer between pooling and head: arXiv:1706.06905, figure 3 ("FC")."""

from math import sqrt

import torch
from torch import Tensor, nn


class HiddenProjection(nn.Module):
    """Project a pooled descriptor to H features: ``y = x W + b``, with no non-linearity.

    All the winning runs had ReLU6 and its batch norm off. W starts as N(0, 1 / sqrt(fan_in)), where
    the code takes the number of the first modality's clusters for the fan-in; b as N(0, 0.01).

    Args:
        num_features: F, the size of the descriptor.
        size: H, the size of the output.
        fan_in: The number that scales W's start.

    Shape:
        - features: ``(..., F)``, floating point.
        - output: ``(..., H)``.
    """

    def __init__(self, *, num_features: int, size: int, fan_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_features, size) / sqrt(fan_in))
        self.bias = nn.Parameter(torch.randn(size) * 0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Return the hidden features."""
        return features @ self.weight + self.bias
