"""What each kind of part offers to the wiring of a sub-model, and how a part refuses its arguments.

B is the number of videos, T the frames of the longest one, R the repeats of sampling, N the frames
that one repeat samples, D the features of a frame, F those of a vector, C the number of classes.

A part's constructor takes the keys of its recipe table, by keyword. Beside these the wiring offers
some facts, and a constructor is given those that it names:

- to a pooling ``num_features`` (D), ``momentum`` (of batch norms), ``num_frames`` (N, or None where
  all frames are read) and ``is_first`` (whether it pools the first of the modalities);
- to a modality fusion ``sizes``, the size of each modality's descriptor;
- to a gating ``num_features`` (F) and ``momentum``;
- to a head ``num_features`` (F) and ``num_classes`` (C);
- to a whole model ``widths`` (D by modality), ``num_classes`` (C) and ``momentum``.

Precisions in blocks store the matrices of products coarsely: each matrix that is a parameter of a
part, as ``x W`` has it. A module whose matrices are compared with the data, such as cluster
centres, names them in ``not_products``, and they are kept finer.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor


class PartError(ValueError):
    """An argument that cannot be used together with what the wiring has.

    Args:
        key: The argument's name, which is the recipe's key too.
        reason: A clause that says what does not fit.
        advice: What the argument should be instead, as the end of "Set KEY to ...".
    """

    def __init__(self, key: str, reason: str, *, advice: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason
        self.advice = advice


def require_divisor(key: str, divisor: int, num_features: int) -> None:
    """Raise ``PartError`` unless an argument divides a number of features."""
    if num_features % divisor:
        raise PartError(
            key,
            f"{num_features} features do not divide into {divisor}",
            advice=f"a divisor of {num_features}",
        )


class Sampling(Protocol):
    """Choose frames of each video, by how often each counts."""

    @property
    def num_frames(self) -> int | None:
        """N, the frames that one repeat samples; None where it takes all."""

    @property
    def num_draws(self) -> int | None:
        """How many uniform numbers one repeat uses; None where nothing is drawn."""

    def __call__(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the weight of each frame in each repeat.

        Args:
            is_frame: ``(B, T)``, bool; False marks padding, which gets weight 0.
            draws: Uniform numbers in [0, 1), ``(B, R, num_draws)``, or ``(R, num_draws)`` for all
                videos alike. None draws one repeat.

        Returns:
            ``(B, R, T)``, float32, at least 0.
        """

    def indices(self, is_frame: Tensor, draws: Tensor | None = None) -> Tensor | None:
        """Return the frames in the order in which they were sampled, for sequence poolings.

        Returns:
            ``(B, R, N)``, int64 in [0, T); None where all frames are taken as they are.
        """


class SetPooling(Protocol):
    """Pool the frames of each video to one vector, whatever their order.

    The work on single frames, ``describe``, is done once; only ``aggregate`` is repeated for each
    draw of the sampling.
    """

    @property
    def output_size(self) -> int:
        """F, the size of the descriptor."""

    @property
    def projection_fan_in(self) -> int:
        """The number that scales the start of a hidden projection after it."""

    @property
    def loops_over_repeats(self) -> bool:
        """Whether ``aggregate`` loops over R, so that an exported graph is for one R only."""

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return whatever ``aggregate`` needs to know of the frames.

        Args:
            frames: ``(B, T, D)``, floating point.
            row_weights: ``(B, T)``, how often a frame counts in batch statistics; 0 for padding.
        """

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return one descriptor for each repeat, ``(B, R, F)``.

        Args:
            described: What ``describe`` returned.
            frame_weights: ``(B, R, T)``, how often a frame counts in each repeat.
        """


class SequencePooling(Protocol):
    """Pool the frames of each video to one vector, reading them in order or all together."""

    @property
    def output_size(self) -> int:
        """F, the size of the descriptor."""

    @property
    def projection_fan_in(self) -> int:
        """The number that scales the start of a hidden projection after it."""

    def __call__(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """Return one descriptor for each video, ``(B, F)``.

        Args:
            frames: ``(B, N, D)``, floating point, the sampled frames themselves.
            num_frames: ``(B,)``, integers in [0, N]; rows from there on are padding.
        """


Pooling: TypeAlias = SetPooling | SequencePooling


class Fusion(Protocol):
    """Join the descriptors of all modalities to one vector."""

    @property
    def output_size(self) -> int:
        """F, the size of the joined vector."""

    @property
    def num_modalities(self) -> int | None:
        """How many modalities it joins; None where any number will do."""

    @property
    def last_penalty(self) -> Tensor | None:
        """What training adds to the loss of the last batch, a scalar; None for nothing."""

    def __call__(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the joined vector, ``(..., F)``, of descriptors ``(..., size)``."""


class Gating(Protocol):
    """Re-weight a vector by gates that are computed from it."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return the gated vector, ``(..., F)`` as ``features``."""


class Model(Protocol):
    """Turn the frames of each modality into the probability of every class: a whole sub-model."""

    def __call__(self, frames: Mapping[str, Tensor], num_frames: Tensor) -> Tensor:
        """Return probabilities in [0, 1], ``(B, C)``.

        Args:
            frames: ``(B, T, D)`` for each modality, float32, dequantised and not normalised;
                padding is 0.
            num_frames: ``(B,)``, integers in [0, T]; frames from there on are padding.
        """

    def regularised(self) -> list[Tensor]:
        """Return the kernels that the L2 penalty applies to; it may be none."""


class Head(Protocol):
    """Turn features into the probability of every class."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return probabilities in [0, 1], ``(..., C)``, of features ``(..., F)``."""

    def regularised(self) -> list[Tensor]:
        """Return the kernels that the L2 penalty applies to."""
