"""The linear layer between pooling and head: arXiv:1706.06905, figure 2 ("FC")."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import BatchNorm


class HiddenProjection(nn.Module):
    """Project a pooled descriptor to H features: ``y = x W + b``, or ``y = act(BN(x W))``.

    The winning runs had neither the batch norm nor its ReLU6. The starter code's DBoF has both;
    NeXtVLAD has dropout on x and the batch norm alone. W starts as N(0, 1 / sqrt(fan_in)), where
    the code takes the number of clusters of the first modality for the fan-in; b starts as
    N(0, 0.01).

    Args:
        num_features: F, the size of the descriptor.
        size: H, the size of the output.
        fan_in: The number that scales the start of W.
        batch_norm_momentum: The momentum of a batch norm in place of the bias; None for the bias.
        has_relu6: Whether ReLU6 follows.
        dropout: The share of x that training drops.

    Shape:
        - features: ``(..., F)``, floating point.
        - output: ``(..., H)``.
    """

    def __init__(
        self,
        *,
        num_features: int,
        size: int,
        fan_in: int,
        batch_norm_momentum: float | None = None,
        has_relu6: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.weight = nn.Parameter(torch.randn(num_features, size) / sqrt(fan_in))
        self.bias: nn.Parameter | None = None
        self.batch_norm: BatchNorm | None = None
        if batch_norm_momentum is None:
            self.bias = nn.Parameter(torch.randn(size) * 0.01)
        else:
            self.batch_norm = BatchNorm(num_features=size, momentum=batch_norm_momentum)
        self.has_relu6 = has_relu6

    def forward(self, features: Tensor) -> Tensor:
        """Return the hidden features."""
        if self.dropout is not None:
            features = self.dropout(features)
        hidden = features @ self.weight
        if self.bias is not None:
            hidden = hidden + self.bias
        if self.batch_norm is not None:
            hidden = self.batch_norm(hidden)
        return nn.functional.relu6(hidden) if self.has_relu6 else hidden
