"""NetFV pooling: arXiv:1706.06905, section 4.2, equations 8 and 9."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import l2_normalise
from ensemble_kit.layers.soft_assignment import SoftAssignment


class NetFV(nn.Module):
    """Describe a set of frames by first- and second-order statistics of each cluster.

    With soft assignment a, frame weights w, centres c and scales s::

        FV1[k, d] = sum_t w_t a_k(x_t) (x_t[d] - c_k[d]) / s_k[d]
        FV2[k, d] = sum_t w_t a_k(x_t) ((x_t[d] - c_k[d])^2 / s_k[d]^2 - 1)

    FV1 is L2-normalised for each cluster and again as one vector; FV2 only as one vector, because
    the code (antoine77340/LOUPE, ``NetFV``) flattens it before its first norm. As in the code,
    ``s = cov^2 + 1e-6``, where cov starts as N(1, 1 / sqrt(D)); FV1 is divided by s once and FV2
    twice. Centres start as N(0, 1 / sqrt(D)) and share nothing with the assignment's weights.

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K, the number of clusters.
        momentum: The momentum of the batch norm's running statistics.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, 2 * K * D)``, FV1 then FV2, both cluster-major.
    """

    loops_over_repeats = False
    not_products = frozenset({"centres", "covariances"})

    def __init__(self, *, num_features: int, num_clusters: int, momentum: float) -> None:
        super().__init__()
        self.output_size = 2 * num_clusters * num_features
        self.projection_fan_in = num_clusters
        self.assignment = SoftAssignment(
            num_features=num_features, num_clusters=num_clusters, momentum=momentum
        )
        shape, deviation = (num_clusters, num_features), 1 / sqrt(num_features)
        self.centres = nn.Parameter(torch.randn(shape) * deviation)
        self.covariances = nn.Parameter(1 + torch.randn(shape) * deviation)

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return the frames beside their squares ``(B, T, 2 * D)``, and the assignments."""
        return torch.cat([frames, frames.square()], dim=-1), self.assignment(frames, row_weights)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return one descriptor for each repeat."""
        powers, assignment = described
        weights = frame_weights.to(powers.dtype).unsqueeze(2)  # (B, R, 1, T)
        weighted = assignment.mT.unsqueeze(1) * weights  # (B, R, K, T)
        sums = (weighted.flatten(1, 2) @ powers).reshape(*weighted.shape[:3], powers.shape[-1])
        first, second = sums.chunk(2, dim=-1)
        mass = weighted.sum(dim=-1, keepdim=True)  # (B, R, K, 1)
        scales = self.covariances.square() + 1e-6
        centred = second + mass * self.centres.square() - 2 * first * self.centres
        fv1 = l2_normalise((first - mass * self.centres) / scales).flatten(2)
        fv2 = (centred / scales.square() - mass).flatten(2)
        return torch.cat([l2_normalise(fv1), l2_normalise(fv2)], dim=-1)
