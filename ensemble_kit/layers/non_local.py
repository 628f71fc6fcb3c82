"""The non-local block on residuals: arXiv:1810.00207, section 2.1, equations 3 to 5."""

from math import sqrt
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn


class NonLocalArguments(TypedDict):
    """The size and temperature of a pooling's non-local block.

    For the inner size ``num_clusters`` stands for the pooling's K and ``half_features`` for D / 2;
    for the temperature ``rsqrt_features`` stands for ``1 / sqrt(D)``.
    """

    inner_size: Literal["num_clusters", "half_features"] | int
    temperature: Literal["rsqrt_features"] | float


class NonLocal(nn.Module):
    """Let each cluster's residual attend to those of all clusters.

    It reads the residuals before they are normalised, one row v_i for each cluster::

        A = softmax_j(tau * (v Wt)(v Wp)^T),    v' = v + (A (v Wg)) Wo

    Equation 5 has no temperature tau. The code has it, because rows grow with the number of frames
    and the softmax saturates without it. There are no biases. Wt, Wp and Wg start as
    N(0, 1 / sqrt(D)), Wo as N(0, 1 / sqrt(inner)). Two of the published models use ``v Wp`` where
    ``v Wg`` belongs and leave Wg unused (17Skye17/2nd-YouTube8M); ours computes the equation for
    all of them, with the same number of parameters.

    Args:
        num_features: D, the size of one residual.
        inner_size: The width of the three inner projections.
        temperature: tau.

    Shape:
        - residuals: ``(..., K, D)``, floating point.
        - output: as ``residuals``.
    """

    def __init__(self, *, num_features: int, inner_size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.theta = nn.Parameter(torch.randn(num_features, inner_size) / sqrt(num_features))
        self.phi = nn.Parameter(torch.randn(num_features, inner_size) / sqrt(num_features))
        self.g = nn.Parameter(torch.randn(num_features, inner_size) / sqrt(num_features))
        self.output = nn.Parameter(torch.randn(inner_size, num_features) / sqrt(inner_size))

    def forward(self, residuals: Tensor) -> Tensor:
        """Return the residuals, each with the attended values of all clusters added."""
        inner = torch.cat([self.theta, self.phi, self.g], dim=1)  # to read the residuals once
        query, key, value = (residuals @ inner).chunk(3, dim=-1)
        attention = (self.temperature * (query @ key.mT)).softmax(dim=-1)
        return residuals + (attention @ value) @ self.output


def non_local_block(
    arguments: NonLocalArguments, *, num_features: int, num_clusters: int
) -> NonLocal:
    """Return the block of a pooling with K clusters of D features."""
    inner_size, temperature = arguments["inner_size"], arguments["temperature"]
    if inner_size == "num_clusters":
        inner_size = num_clusters
    elif inner_size == "half_features":
        inner_size = num_features // 2
    if temperature == "rsqrt_features":
        temperature = 1 / sqrt(num_features)
    return NonLocal(num_features=num_features, inner_size=inner_size, temperature=temperature)
