"""Soft assignment of frames to clusters: arXiv:1706.06905, section 4.1, equation 5."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import BatchNorm


class SoftAssignment(nn.Module):
    """Compute how much each frame belongs to each cluster: ``a(x) = softmax(BN(x W))``.

    arXiv:1706.06905, equation 5, with a batch norm in place of the bias, as in its code. W starts
    as N(0, 1 / sqrt(D)).

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K, the number of clusters.
        momentum: The momentum of the batch norm's running statistics.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - row_weights: ``(B, T)``, how often a frame counts in the batch's statistics.
        - output: ``(B, T, K)``, the sum of each row is 1.
    """

    def __init__(self, *, num_features: int, num_clusters: int, momentum: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_features, num_clusters) / sqrt(num_features))
        self.batch_norm = BatchNorm(num_features=num_clusters, momentum=momentum)

    def forward(self, frames: Tensor, row_weights: Tensor) -> Tensor:
        """Return every frame's share in every cluster."""
        logits = self.batch_norm.of_product(frames, self.weight, row_weights)
        return logits.softmax(dim=-1)
