"""NetVLAD and NetRVLAD pooling: arXiv:1511.07247, equation 4; arXiv:1706.06905, section 4.

Section 4.1 of the second paper, equation 6, is NetVLAD; section 4.2, equation 10, is NetRVLAD.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.non_local import NonLocalArguments, non_local_block
from ensemble_kit.layers.normalisation import l2_normalise_twice
from ensemble_kit.layers.soft_assignment import SoftAssignment


class NetVLAD(nn.Module):
    """Describe a set of frames by its residuals to K learned cluster centres.

    With soft assignment ``a_k`` and frame weights ``w_t``::

        V[k, d] = sum_t w_t * a_k(x_t) * (x_t[d] - c_k[d])

    V is then L2-normalised for each cluster and again as one vector. As in the code of the second
    paper (antoine77340/LOUPE) the centres are independent of the assignment's weights, start as
    N(0, 1 / sqrt(D)) and not from k-means, and the assignment has a batch norm. Ours differs in the
    order of the output: it is cluster-major where theirs is feature-major. The next layer's weights
    absorb that permutation.

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K, the number of cluster centres.
        momentum: The momentum of the batch norm's running statistics.
        has_centres: False is NetRVLAD, equation 10 of arXiv:1706.06905: sums instead of residuals.
        non_local: The block that the residuals pass before they are normalised, or None.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``; 0 for padding.
        - output: ``(B, R, K * D)``, cluster-major; L2 norm 1, or 0 with no frame.
    """

    loops_over_repeats = False
    not_products = frozenset({"centres"})

    def __init__(
        self,
        *,
        num_features: int,
        num_clusters: int,
        momentum: float,
        has_centres: bool = True,
        non_local: NonLocalArguments | None = None,
    ) -> None:
        super().__init__()
        # before the other weights, because the order decides what a seed gives to each of them
        block = (
            non_local_block(non_local, num_features=num_features, num_clusters=num_clusters)
            if non_local is not None
            else None
        )
        self.output_size = num_clusters * num_features
        self.projection_fan_in = num_clusters  # the code's scale, not the true fan-in K * D
        self.assignment = SoftAssignment(
            num_features=num_features, num_clusters=num_clusters, momentum=momentum
        )
        self.centres: nn.Parameter | None = None
        if has_centres:
            start = torch.randn(num_clusters, num_features) / sqrt(num_features)
            self.centres = nn.Parameter(start)
        self.non_local = block

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return the frames and their soft assignments ``(B, T, K)``."""
        return frames, self.assignment(frames, row_weights)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return one normalised descriptor for each repeat."""
        residuals = self.residuals(described, frame_weights)
        if self.non_local is not None:
            residuals = self.non_local(residuals)
        return l2_normalise_twice(residuals)

    def residuals(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return V before it is normalised, ``(B, R, K, D)``."""
        frames, assignment = described
        weights = frame_weights.to(frames.dtype).unsqueeze(2)  # (B, R, 1, T)
        weighted = assignment.mT.unsqueeze(1) * weights  # (B, R, K, T)
        products = weighted.flatten(1, 2) @ frames  # for all repeats in one: (B, R * K, D)
        sums = products.reshape(*weighted.shape[:3], frames.shape[-1])
        if self.centres is None:
            return sums
        return sums - weighted.sum(dim=-1, keepdim=True) * self.centres
