"""Second-order function approximation: S4 (arXiv:1810.00530), section 3.3, figure 3."""

from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ensemble_kit.layers.normalisation import l2_normalise
from ensemble_kit.layers.precision import at_least_float32, without_autocast
from ensemble_kit.layers.soft_assignment import SoftAssignment
from ensemble_kit.layers.synchronised import sum_over_processes

EPSILON = 1e-6  # of squared distances and of variances


class WhitenedResiduals(nn.Module):
    """Sum the normalised and whitened residuals of a set of frames to each of K centres.

    First order, ``r_tk = (x_t - c_k) / |x_t - c_k|``; second order,
    ``r_tk = vec((x_t - c_k)(x_t - c_k)^T) / |x_t - c_k|^2``. Then::

        S[k] = sum_t w_t a_tk (r_tk - mean_k) / sqrt(var_k + 1e-6),    output[k] = S[k] / |S[k]|

    Whitening is diagonal: it uses the mean and variance of each cluster's residuals over all
    frames, one dimension at a time, kept as running statistics. The paper whitens with
    ``Sigma^-1/2`` and names no estimator. Nothing of size B x T x K x D is ever computed: a sum of
    residuals, or of their squares, is expanded into sums of products of frames with weights divided
    by distances.

    Args:
        num_features: D.
        num_clusters: K.
        order: 1 or 2.
        momentum: The share of a new batch in the running statistics.

    Attributes:
        group: The processes that train together, whose frames count as those of one batch; None
            where this process is the only one.

    Shape:
        - frames: ``(B, T, D)``; assignment: ``(B, T, K)``; frame_weights: ``(B, R, T)``;
          row_weights: ``(B, T)``, how often a frame counts in the batch's statistics.
        - output: ``(B, R, K, D)``, or ``(B, R, K, D * D)`` of second order.
    """

    running_mean: Tensor
    running_variance: Tensor

    not_products = frozenset({"centres"})

    def __init__(
        self, *, num_features: int, num_clusters: int, order: int, momentum: float
    ) -> None:
        super().__init__()
        self.order = order
        self.momentum: float | None = momentum
        self.num_batches = 0
        self.group: ProcessGroup | None = None
        self.centres = nn.Parameter(torch.randn(num_clusters, num_features) / sqrt(num_features))
        shape = (num_clusters, num_features**order)
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_variance", torch.ones(shape))

    def reset_statistics(self) -> None:
        """Forget all batches seen."""
        self.num_batches = 0
        self.running_mean.zero_()
        self.running_variance.fill_(1.0)

    def describe(
        self, frames: Tensor, assignment: Tensor, row_weights: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the frames, assignments over distances, assignments and statistics."""
        distances = (
            frames.square().sum(dim=-1, keepdim=True)
            - 2 * frames @ self.centres.mT
            + self.centres.square().sum(dim=-1)
        ).clamp_min(EPSILON)  # (B, T, K), squared
        scales = distances.rsqrt() if self.order == 1 else distances.reciprocal()
        if self.training:
            mean, variance = self._observe(frames, scales, row_weights)
        else:
            mean, variance = self.running_mean, self.running_variance
        return frames, assignment * scales, assignment, mean, variance

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return the whitened sums of each repeat, normalised by cluster."""
        frames, scaled, assignment, mean, variance = described
        weights = frame_weights.to(frames.dtype)
        sums = self._residual_sums(frames, scaled.mT.unsqueeze(1) * weights.unsqueeze(2))
        mass = (weights @ assignment).unsqueeze(-1)  # (B, R, K, 1)
        return l2_normalise((sums - mass * mean) * (variance + EPSILON).rsqrt())

    def _residual_sums(self, frames: Tensor, weights: Tensor) -> Tensor:
        """Sum ``weights[k, t] * residual[t, k]`` over t, residuals before they are normalised.

        Args:
            frames: ``(B, T, D)``.
            weights: ``(B, R, K, T)``.

        Returns:
            ``(B, R, K, D ** order)``.
        """
        mass = weights.sum(dim=-1, keepdim=True)
        first = _weighted_sums(frames, weights)
        if self.order == 1:
            return first - mass * self.centres
        second = _weighted_sums(_outer(frames, frames), weights)
        cross = _outer(first, self.centres) + _outer(self.centres, first)
        return second - cross + mass * _outer(self.centres, self.centres)

    def _observe(
        self, frames: Tensor, scales: Tensor, row_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = frames.flatten(0, 1).unsqueeze(0)  # (1, B * T, D)
        weights = row_weights.flatten().to(rows.dtype)
        total = sum_over_processes(weights.sum(), self.group).clamp_min(1.0)
        flat = scales.flatten(0, 1).mT  # (K, B * T)
        sums = self._residual_sums(rows, (flat * weights).unsqueeze(0).unsqueeze(0))
        squares = self._squared_sums(rows, (flat.square() * weights).unsqueeze(0).unsqueeze(0))
        mean, mean_square = (
            sum_over_processes(torch.stack([sums[0, 0], squares[0, 0]]), self.group) / total
        )
        variance = (mean_square - mean.square()).clamp_min(0.0)
        with torch.no_grad():
            share = self.momentum
            if share is None:  # counting in training too would recompile a compiled step each time
                self.num_batches += 1
                share = 1.0 / self.num_batches
            self.running_mean.lerp_(mean, share)
            self.running_variance.lerp_(variance, share)
        return mean, variance

    def _squared_sums(self, frames: Tensor, weights: Tensor) -> Tensor:
        """Sum ``weights[k, t] * residual[t, k]^2`` over t; shapes as in ``_residual_sums``.

        This is expanded too, because a loop over clusters would keep K copies of the frames for the
        backward pass.
        """
        centres = self.centres
        mass = weights.sum(dim=-1, keepdim=True)
        first = _weighted_sums(frames, weights)
        second = _weighted_sums(frames.square(), weights)
        if self.order == 1:
            return second - 2 * first * centres + mass * centres.square()
        # (x_i - c_i)^2 (x_j - c_j)^2: terms symmetric in i and j, then the others with their
        # mirrors
        products = _outer(frames, frames)
        even = (
            _weighted_sums(products.square(), weights)
            + 4 * _weighted_sums(products, weights) * _outer(centres, centres)
            + mass * _outer(centres.square(), centres.square())
        )
        cubes = _weighted_sums(_outer(frames.square(), frames), weights)
        odd = _outer(second - 2 * first * centres, centres.square())
        odd = odd - 2 * cubes * _outer(torch.ones_like(centres), centres)
        square = odd.reshape(*first.shape, centres.shape[-1])
        return even + (square + square.mT).flatten(-2)


class SecondOrder(nn.Module):
    """First- and second-order residuals of a set of frames, side by side.

    Branch 1 sums residuals of the frames. Branch 2 projects the frames to F' features and sums
    outer products of their residuals; it has its own centres and assignment. The zeroth-order term
    of equation 7 is left out, as in figure 3. Everything is computed in float32 even under
    autocast, because sums of residuals are differences of large sums. The projection starts as N(0,
    1 / sqrt(D)).

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K of both branches.
        reduced_size: F'.
        momentum: The share of a new batch in all running statistics.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, K * D + K * F' * F')``; every cluster's part of L2 norm 1, or 0.
    """

    loops_over_repeats = False

    def __init__(
        self, *, num_features: int, num_clusters: int, reduced_size: int, momentum: float
    ) -> None:
        super().__init__()
        self.output_size = num_clusters * (num_features + reduced_size**2)
        self.projection_fan_in = num_clusters
        self.projection = nn.Parameter(torch.randn(num_features, reduced_size) / sqrt(num_features))
        self.assignments = nn.ModuleList(
            SoftAssignment(num_features=size, num_clusters=num_clusters, momentum=momentum)
            for size in (num_features, reduced_size)
        )
        self.branches = nn.ModuleList(
            WhitenedResiduals(
                num_features=size, num_clusters=num_clusters, order=order, momentum=momentum
            )
            for order, size in ((1, num_features), (2, reduced_size))
        )

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return the frames of both branches, their assignments and statistics."""
        described: list[Tensor] = []
        with without_autocast(frames):
            frames = at_least_float32(frames)
            for branch, assignment, rows in zip(
                self._branches, self.assignments, (frames, frames @ self.projection), strict=True
            ):
                described += branch.describe(rows, assignment(rows, row_weights), row_weights)
        return tuple(described)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return both branches' sums for each repeat."""
        half = len(described) // 2
        with without_autocast(frame_weights):
            parts = [
                branch.aggregate(part, frame_weights).flatten(2)
                for branch, part in zip(
                    self._branches, (described[:half], described[half:]), strict=True
                )
            ]
        return torch.cat(parts, dim=-1)

    @property
    def _branches(self) -> list[WhitenedResiduals]:
        return [cast(WhitenedResiduals, branch) for branch in self.branches]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left[i] * right[j]`` of the last dimensions, ``(..., D * D)``; j runs faster."""
    return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)


def _weighted_sums(rows: Tensor, weights: Tensor) -> Tensor:
    """Sum rows ``(B, T, F)`` by weights ``(B, R, K, T)``, in one product for all repeats."""
    sums = weights.flatten(1, 2) @ rows
    return sums.reshape(*weights.shape[:3], rows.shape[-1])
