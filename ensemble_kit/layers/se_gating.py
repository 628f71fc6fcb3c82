"""Squeeze-and-excitation gating of a vector: arXiv:1811.05014, section 3.3."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import BatchNorm


class SEGating(nn.Module):
    """Gate a vector through a narrow layer: ``y = x * sigmoid(relu(BN(x W1)) W2)``.

    NeXtVLAD uses it in place of context gating, with about an eighth of the parameters
    (linrongc/youtube-8m). Matrices start as N(0, 1 / sqrt(fan-in)).

    Args:
        num_features: F, the size of the vector; the narrow layer has F / 16.
        momentum: The momentum of the batch norm's running statistics.

    Shape:
        - features: ``(..., F)``, floating point.
        - output: as ``features``.
    """

    REDUCTION = 16

    def __init__(self, *, num_features: int, momentum: float) -> None:
        super().__init__()
        narrow = max(1, num_features // self.REDUCTION)
        self.squeeze = nn.Parameter(torch.randn(num_features, narrow) / sqrt(num_features))
        self.batch_norm = BatchNorm(num_features=narrow, momentum=momentum)
        self.excite = nn.Parameter(torch.randn(narrow, num_features) / sqrt(narrow))

    def forward(self, features: Tensor) -> Tensor:
        """Return the gated vector."""
        squeezed: Tensor = self.batch_norm(features @ self.squeeze)
        return features * (squeezed.relu() @ self.excite).sigmoid()
