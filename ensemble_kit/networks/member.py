"""What a model must offer to be a member of an ensemble."""

from collections.abc import Mapping
from typing import Protocol, Self

from torch import Tensor

from ensemble_kit.data.schema import Schema
from ensemble_kit.layers.frame_preparation import PreparedFrames


class MemberModel(Protocol):
    """A PyTorch module that turns frames into the probability of every class.

    ``SubModel`` is one that the kit trained, ``ForeignModel`` one that another framework wrote.

    Attributes:
        schema: The modalities and classes that it was built for.
    """

    schema: Schema

    @property
    def num_draws(self) -> int | None:
        """How many uniform numbers one repeat uses; None where nothing is drawn."""

    @property
    def loops_over_repeats(self) -> bool:
        """Whether an exported graph serves one number of repeats only."""

    def eval(self) -> Self:
        """Return the model in evaluation mode."""

    def to(self, device: str, /) -> Self:
        """Return the model on a device."""

    def draws_for(self, name: str, *, repeats: int) -> Tensor | None:
        """Return the fixed uniform numbers ``(R, N)`` of a member of this name, or None."""

    def classify(self, prepared: PreparedFrames, draws: Tensor | None = None) -> Tensor:
        """Return probabilities ``(B, C)``, float32, for frames that are prepared already."""

    def __call__(
        self, frames: Mapping[str, Tensor], num_frames: Tensor, draws: Tensor | None = None
    ) -> Tensor:
        """Return probabilities ``(B, C)``, float32, for frames ``(B, T, D)`` as they are stored."""
