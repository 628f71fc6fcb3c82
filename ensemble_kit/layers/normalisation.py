"""L2 and batch normalisation as TF-slim computes them."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ensemble_kit.layers.precision import at_least_float32, without_autocast
from ensemble_kit.layers.synchronised import sum_over_processes


def l2_normalise(values: Tensor, *, dim: int = -1) -> Tensor:
    """Scale vectors to length 1: ``x * rsqrt(max(sum x^2, 1e-12))``; a zero vector stays zero.

    Args:
        values: Floating point, any shape.
        dim: The dimension that holds a vector's entries.
    """
    return values * _inverse_length(values, dim)


def l2_normalise_twice(rows: Tensor) -> Tensor:
    """Scale rows to length 1, and then all of them as one vector.

    The same as ``l2_normalise(l2_normalise(rows).flatten(-2))``, but the second length follows from
    the first ones, so that the numbers are scaled only once.

    Args:
        rows: ``(..., K, D)``, floating point.

    Returns:
        ``(..., K * D)``.
    """
    factors = _inverse_length(rows, -1)  # (..., K, 1)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True) * factors  # 1, or less near 0
    return (rows * (factors * _inverse_length(lengths, -2))).flatten(-2)


def _inverse_length(values: Tensor, dim: int) -> Tensor:
    # a norm, not a sum of squares: ONNX Runtime would write every square to memory
    length: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return length.clamp_min(1e-6).reciprocal()


class BatchNorm(nn.Module):
    """Batch normalisation over all dimensions but the last, with a weight for each row.

    Ioffe and Szegedy (arXiv:1502.03167, algorithm 1) with the constants of TF-slim that all five
    systems used: epsilon 1e-3, and by default a decay of 0.999. In training, a row of weight w
    counts as w equal rows, so frames drawn with replacement need not be copied; padding has weight
    0. The running variance is the unbiased one, as in PyTorch. Statistics are computed in float32
    even under autocast.

    Args:
        num_features: F, the size of the last dimension.
        momentum: The share of a new batch in the running statistics, 1 - decay. None averages
            all batches since ``reset_statistics`` equally, which recalibration after checkpoint
            averaging uses.

    Attributes:
        group: The processes that train together, whose rows count as those of one batch; None
            where this process is the only one.

    Shape:
        - values: ``(..., F)``, floating point.
        - row_weights: ``(...)``, as ``values`` without its last dimension, or None for ones.
        - output: as ``values``.
    """

    EPSILON = 1e-3
    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, *, num_features: int, momentum: float | None = 0.001) -> None:
        super().__init__()
        self.momentum = momentum
        self.num_batches = 0
        self.group: ProcessGroup | None = None
        self.scale = nn.Parameter(torch.ones(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_variance", torch.ones(num_features))

    def forward(self, values: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """Normalise with the batch's statistics in training, the running ones otherwise."""
        if self.training:
            with without_autocast(values):
                statistics = self._observe(at_least_float32(values), row_weights)
            factor, offset = self._affine(*statistics)
        else:
            factor, offset = self._affine(self.running_mean, self.running_variance)
        return values * factor + offset

    def of_product(self, rows: Tensor, weight: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """Return ``BN(rows @ weight)``.

        Outside of training the weights are scaled instead of the products, because they are fewer
        numbers than the products of many frames. ONNX Runtime scales them once, when it opens a
        file.

        Args:
            rows: ``(..., D)``, floating point.
            weight: ``(D, F)``.
            row_weights: As for ``forward``.
        """
        if self.training:
            normalised: Tensor = self(rows @ weight, row_weights)
            return normalised
        factor, offset = self._affine(self.running_mean, self.running_variance)
        product = torch.addmm(offset, rows.flatten(0, -2), weight * factor)
        return product.reshape(*rows.shape[:-1], weight.shape[1])

    def reset_statistics(self) -> None:
        """Forget all batches seen."""
        self.num_batches = 0
        self.running_mean.zero_()
        self.running_variance.fill_(1.0)

    def _affine(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.scale * (variance + self.EPSILON).rsqrt()
        return factor, self.shift - mean * factor

    def _observe(self, values: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = values.flatten(0, -2)
        if row_weights is None and self.group is None:
            total = torch.tensor(float(rows.shape[0]), dtype=rows.dtype, device=rows.device)
            mean = rows.mean(dim=0)
            variance = rows.var(dim=0, correction=0)
        else:
            if row_weights is None:
                weights = rows.new_ones(rows.shape[0])
            else:
                weights = row_weights.flatten().to(rows.dtype)
            sums = torch.cat([weights.sum().unsqueeze(0), weights @ rows])
            sums = sum_over_processes(sums, self.group)
            total = sums[0].clamp_min(1.0)
            mean = sums[1:] / total
            squares = sum_over_processes(weights @ (rows - mean).square(), self.group)
            variance = squares / total
        with torch.no_grad():
            share = self.momentum
            if share is None:  # counting in training too would recompile a compiled step each time
                self.num_batches += 1
                share = 1.0 / self.num_batches
            unbiased = variance * (total / (total - 1).clamp_min(1.0))
            self.running_mean.lerp_(mean, share)
            self.running_variance.lerp_(unbiased, share)
        return mean, variance
