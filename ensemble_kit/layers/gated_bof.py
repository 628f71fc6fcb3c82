"""Gated bag of features: arXiv:1706.06905, table 1, "Gated BoW"."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.max_pooling import max_over_drawn
from ensemble_kit.layers.normalisation import BatchNorm, l2_normalise
from ensemble_kit.layers.soft_assignment import SoftAssignment


class GatedBoF(nn.Module):
    """A soft bag of features whose counts are gated by the largest assignment of each cluster.

    The paper gives no equation; this is its code (antoine77340/Youtube-8M-WILLOW, ``GatedDbof``),
    with soft assignment a and the low-rank matrices R (K x rank) and Q (rank x K)::

        s[k] = sum_t w_t a_k(x_t),    q = l2(max_t a(x_t))
        output = l2(s * sigmoid(BN(q R Q)))

    R and Q start as N(0, 1 / sqrt(rank)). The code gates the first modality only; of the others it
    returns ``l2(s)``, which is a soft bag of features.

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K, the number of clusters.
        gate_rank: The inner size of the gate; 1,024 in the code.
        momentum: The momentum of the batch norms' running statistics.
        is_first: Whether these are the frames of the first modality, whose counts are gated.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, K)``, L2 norm 1, or 0 with no frame.
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_clusters: int,
        gate_rank: int,
        momentum: float,
        is_first: bool = True,
    ) -> None:
        super().__init__()
        self.loops_over_repeats = self.is_gated = is_first
        self.output_size = num_clusters
        self.projection_fan_in = num_clusters
        self.assignment = SoftAssignment(
            num_features=num_features, num_clusters=num_clusters, momentum=momentum
        )
        if not self.is_gated:
            return
        self.gate_in = nn.Parameter(torch.randn(num_clusters, gate_rank) / sqrt(gate_rank))
        self.gate_out = nn.Parameter(torch.randn(gate_rank, num_clusters) / sqrt(gate_rank))
        self.batch_norm = BatchNorm(num_features=num_clusters, momentum=momentum)

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return the soft assignments ``(B, T, K)``."""
        return (self.assignment(frames, row_weights),)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return one gated histogram for each repeat."""
        (assignment,) = described
        counts = frame_weights.to(assignment.dtype) @ assignment
        if not self.is_gated:
            return l2_normalise(counts)
        largest = l2_normalise(max_over_drawn(assignment, frame_weights))
        gate: Tensor = self.batch_norm(largest @ self.gate_in @ self.gate_out)
        return l2_normalise(counts * gate.sigmoid())
