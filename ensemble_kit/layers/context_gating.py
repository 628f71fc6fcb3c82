"""Context gating: arXiv:1706.06905, equation 1; arXiv:1810.00207, equation 6."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import BatchNorm


class ContextGating(nn.Module):
    """Re-weight a vector by a gate computed from itself: ``y = x * sigmoid(BN(x W))``.

    Batch norm takes the place of the equation's bias, as in the code of both papers. W starts as
    N(0, 1 / sqrt(F)). The same layer gates hidden features and class probabilities.

    Args:
        num_features: F, the size of the vector.
        momentum: The momentum of the batch norm's running statistics.
        remove_diagonal: Whether the diagonal of W counts as 0, so that no feature takes part in its
            own gate.

    Shape:
        - features: ``(..., F)``, floating point.
        - output: as ``features``; probabilities stay in [0, 1).
    """

    def __init__(
        self, *, num_features: int, momentum: float, remove_diagonal: bool = False
    ) -> None:
        super().__init__()
        self.remove_diagonal = remove_diagonal
        self.weight = nn.Parameter(torch.randn(num_features, num_features) / sqrt(num_features))
        self.batch_norm = BatchNorm(num_features=num_features, momentum=momentum)

    def forward(self, features: Tensor) -> Tensor:
        """Return the gated vector."""
        logits = features @ self.weight
        if self.remove_diagonal:
            logits = logits - features * self.weight.diagonal()
        gate: Tensor = self.batch_norm(logits)
        return features * gate.sigmoid()
