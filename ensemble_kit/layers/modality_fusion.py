"""How the pooled modalities become one vector.

S1, sections 3.1, 3.3 and 4.3; S3, which has no numbered sections, "Multimodal Fusion" and figure 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import l2_normalise


class Concat(nn.Module):
    """The modalities side by side.

    Args:
        sizes: The size of each modality's descriptor.

    Shape:
        - pooled: ``(..., size)`` for each modality.
        - output: ``(..., sum of sizes)``.
    """

    num_modalities = None
    last_penalty = None

    def __init__(self, *, sizes: Sequence[int]) -> None:
        super().__init__()
        self.output_size = sum(sizes)

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the concatenation."""
        return torch.cat(list(pooled), dim=-1) if len(pooled) > 1 else pooled[0]


class FCConcat(nn.Module):
    """Each modality projected, then side by side: ``[U l + b; V a + c]`` (S1, section 4.3).

    Projections start Glorot uniform, biases at 0.

    Args:
        sizes: The size of each modality's descriptor.
        size: The width of each projection. In the paper it has as many parameters as MFB, whose
            projections are 5,000 wide.

    Shape:
        - pooled: ``(..., size)`` for each modality.
        - output: ``(..., number of modalities * size)``.
    """

    num_modalities = None
    last_penalty = None

    def __init__(self, *, sizes: Sequence[int], size: int) -> None:
        super().__init__()
        self.output_size = size * len(sizes)
        self.projections = nn.ModuleList([_glorot(width, size) for width in sizes])

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the projections, side by side."""
        pairs = zip(self.projections, pooled, strict=True)
        return torch.cat([projection(values) for projection, values in pairs], dim=-1)


class MFB(nn.Module):
    """Multi-modal factorised bilinear pooling: S1, equations 1 and 2.

    ::

        z = dropout((U l + b) * (V a + c)),   y[i] = sum_{j < k} z[i * k + j]
        output = l2(relu(y))

    As in section 3.1 of S1, a ReLU replaces the signed square root of MFB's authors. S1 gives the
    dropout, 0.1, but neither k nor the size; the recipes take 5 and 1,000 from yuzcccc/vqa-mfb.

    Args:
        sizes: The sizes of the two modalities' descriptors.
        size: o, the size of the output.
        factors: k, the number of products summed into one output.
        dropout: The share of z that training drops.

    Shape:
        - pooled: ``(..., size)`` for each of two modalities.
        - output: ``(..., o)``, L2 norm 1 or 0.
    """

    num_modalities = 2
    last_penalty = None

    def __init__(self, *, sizes: Sequence[int], size: int, factors: int, dropout: float) -> None:
        super().__init__()
        self.output_size = size
        self.factors = factors
        self.projections = nn.ModuleList([_glorot(width, size * factors) for width in sizes])
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the fused vector."""
        left, right = (
            projection(values) for projection, values in zip(self.projections, pooled, strict=True)
        )
        products: Tensor = self.dropout(left * right)
        grouped = torch.unflatten(products, -1, (self.output_size, self.factors))
        return l2_normalise(grouped.sum(dim=-1).relu())


class SharedSpace(nn.Module):
    """Both modalities mapped into one space: ``m = tanh(W1 x1 + W2 x2 + b)`` (S3, figure 3).

    The paper writes ``m = f(x1, x2)`` and gives neither f nor its width; ours is one layer. The
    mappings start as N(0, 0.01), as the paper says.

    Args:
        sizes: The size of each modality's descriptor.
        size: The width of the shared space.

    Shape:
        - pooled: ``(..., size)`` for each modality.
        - output: ``(..., size)`` in (-1, 1).
    """

    num_modalities = None
    last_penalty = None

    def __init__(self, *, sizes: Sequence[int], size: int) -> None:
        super().__init__()
        self.output_size = size
        self.weights = nn.ParameterList([0.01 * torch.randn(width, size) for width in sizes])
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the shared vector."""
        mapped = [values @ weight for values, weight in zip(pooled, self.weights, strict=True)]
        return (torch.stack(mapped).sum(dim=0) + self.bias).tanh()


class Projection(nn.Module):
    """Each modality mapped, side by side, with a penalty on their distance (S3, figure 3).

    The output is ``[W1 x1; W2 x2]``; the loss gains ``penalty * mean_b |W1 x1 - W2 x2|^2``. The
    paper gives neither the width nor the penalty's weight. The mappings start as N(0, 0.01).

    Args:
        sizes: The sizes of the two modalities' descriptors.
        size: The width of each mapping.
        penalty: The weight of the distance in the loss.

    Attributes:
        last_penalty: The penalty of the last batch in training, which the loss adds.

    Shape:
        - pooled: ``(..., size)`` for each of two modalities.
        - output: ``(..., 2 * size)``.
    """

    num_modalities = 2
    last_penalty: Tensor | None = None

    def __init__(self, *, sizes: Sequence[int], size: int, penalty: float) -> None:
        super().__init__()
        self.output_size = size * len(sizes)
        self.penalty = penalty
        self.weights = nn.ParameterList([0.01 * torch.randn(width, size) for width in sizes])

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the mapped modalities; in training, keep the penalty on their distance."""
        left, right = (values @ weight for values, weight in zip(pooled, self.weights, strict=True))
        if self.training:
            self.last_penalty = self.penalty * (left - right).square().sum(dim=-1).mean()
        return torch.cat([left, right], dim=-1)


def _glorot(width: int, size: int) -> nn.Linear:
    layer = nn.Linear(width, size)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
