"""NeXtVLAD pooling: arXiv:1811.05014, section 3."""

from math import sqrt

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import BatchNorm, l2_normalise
from ensemble_kit.layers.protocols import require_divisor


class NeXtVLAD(nn.Module):
    """NetVLAD over groups of an expanded frame, with a separate attention for each group.

    With the frame expanded to ``x' = x We + be`` of size E * D and cut into G groups x'_g::

        alpha_g = sigmoid(x' Wa + ba)_g,    a_gk = softmax_k(BN(x' Wc))
        V[k] = sum_t w_t sum_g alpha_g a_gk (x'_tg - c_k),    output = BN(vec(l2(V[k])))

    The code is linrongc/youtube-8m, ``NeXtVLADModel``. As in the code, the recipe reads frames that
    are not L2-normalised. The code also undoes the whitening of rgb with the extractor's
    eigenvalues, which are not part of the data, and subtracts 4/512; ours does neither. Matrices
    start as in TF-slim's fully connected layers, assignment and centres as N(0, 1 / sqrt(fan-in)).

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K.
        expansion: E.
        num_groups: G; divides E * D.
        momentum: The momentum of the batch norms' running statistics.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, K * E * D / G)``.

    Raises:
        PartError: G does not divide E * D.
    """

    loops_over_repeats = False
    not_products = frozenset({"centres"})

    def __init__(
        self,
        *,
        num_features: int,
        num_clusters: int,
        expansion: int,
        num_groups: int,
        momentum: float,
    ) -> None:
        super().__init__()
        wide = expansion * num_features
        require_divisor("num_groups", num_groups, wide)
        self.group_size = wide // num_groups
        self.num_groups = num_groups
        self.num_clusters = num_clusters
        self.output_size = num_clusters * self.group_size
        self.projection_fan_in = self.output_size
        self.expand = nn.Linear(num_features, wide)
        self.attention = nn.Linear(wide, num_groups)
        for layer in (self.expand, self.attention):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.assignment = nn.Parameter(torch.randn(wide, num_groups * num_clusters) / sqrt(wide))
        self.assignment_norm = BatchNorm(num_features=num_groups * num_clusters, momentum=momentum)
        start = torch.randn(num_clusters, self.group_size) / sqrt(self.group_size)
        self.centres = nn.Parameter(start)
        self.output_norm = BatchNorm(num_features=self.output_size, momentum=momentum)

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return the groups ``(B, T * G, E * D / G)`` and their shares ``(B, T * G, K)``."""
        wide = self.expand(frames)
        logits = self.assignment_norm.of_product(wide, self.assignment, row_weights)
        batch, length = frames.shape[0], frames.shape[1]
        shares = logits.reshape(batch, length, self.num_groups, self.num_clusters).softmax(dim=-1)
        shares = shares * self.attention(wide).sigmoid().unsqueeze(-1)
        groups = wide.reshape(batch, length * self.num_groups, self.group_size)
        return groups, shares.flatten(1, 2)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return one descriptor for each repeat."""
        groups, shares = described
        weights = frame_weights.to(groups.dtype).repeat_interleave(self.num_groups, dim=-1)
        weighted = shares.mT.unsqueeze(1) * weights.unsqueeze(2)  # (B, R, K, T * G)
        sums = (weighted.flatten(1, 2) @ groups).reshape(*weighted.shape[:3], self.group_size)
        residuals = sums - weighted.sum(dim=-1, keepdim=True) * self.centres
        output: Tensor = self.output_norm(l2_normalise(residuals).flatten(2))
        return output
