"""Many members in one graph."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ensemble_kit.data.schema import Schema
from ensemble_kit.draws import draws_name
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.networks.member import MemberModel
from ensemble_kit.store.provenance import MemberMetadata

MOST_FRAMES = 3_000  # of a video that is made up: 50 minutes of YouTube-8M's features


class FusedEnsemble(nn.Module):
    """The mixed probabilities of several sub-models over the same frames.

    The frames are dequantised and normalised once for all members. A member that samples at random
    does so R times, with its own fixed table of uniform numbers, so the same video always gets the
    same probabilities, alone or in any batch. A member that draws nothing runs once.

    Args:
        members: The models by name, all built for the same schema.
        coefficients: The mixing coefficient of each member; they sum to 1.
        schema: The modalities and classes.
        repeats: R, the number of test-time draws whose probabilities are averaged.
    """

    def __init__(
        self,
        members: Mapping[str, MemberModel],
        coefficients: Sequence[float],
        schema: Schema,
        *,
        repeats: int,
    ) -> None:
        super().__init__()
        self.names = tuple(members)
        self.coefficients = tuple(coefficients)
        self.schema = schema
        self.repeats = repeats
        self.random_names: list[str] = []
        for name, member in members.items():
            self.add_module(module_name(name), cast(nn.Module, member))
            table = member.draws_for(name, repeats=repeats)
            if table is not None:
                self.random_names.append(name)
                self.register_buffer(draws_name(name), table, persistent=False)

    def forward(self, frames: Mapping[str, Tensor], num_frames: Tensor) -> Tensor:
        """Return the probability of every class.

        Args:
            frames: ``(B, T, D)`` for each modality of the schema, uint8 or floating point.
            num_frames: ``(B,)``, integers; frames from there on are padding and change nothing.

        Returns:
            ``(B, C)``, float32 in [0, 1].
        """
        tables = {name: getattr(self, draws_name(name)) for name in self.random_names}
        return self.mix(self.shares(frames, num_frames, tables))

    def shares(
        self, frames: Mapping[str, Tensor], num_frames: Tensor, draws: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return each member's probabilities times its coefficient, ``(B, C)``.

        Args:
            frames: As in ``forward``.
            num_frames: As in ``forward``.
            draws: Uniform numbers ``(R, N)`` or ``(B, R, N)`` for each of ``random_names``.
        """
        prepared = prepare_frames(self.schema.ordered(frames), num_frames)
        return [
            coefficient * self.member(name).classify(prepared, draws.get(name))
            for name, coefficient in zip(self.names, self.coefficients, strict=True)
        ]

    @staticmethod
    def mix(shares: Sequence[Tensor]) -> Tensor:
        """Return the sum of the members' shares, ``(B, C)``."""
        mixed = shares[0]
        for share in shares[1:]:
            mixed = mixed + share
        return mixed

    @property
    def repeats_are_free(self) -> bool:
        """Whether one graph may run any number of repeats: no member loops over them."""
        return not any(self.member(name).loops_over_repeats for name in self.names)

    def member(self, name: str) -> MemberModel:
        """Return a member by its name."""
        return cast(MemberModel, self.get_submodule(module_name(name)))


def module_name(member: str) -> str:
    """Return the name of a member's module, because ``train`` and ``float`` are Module's own."""
    return f"member_{member}"


def longest_proof(schema: Schema, members: Iterable[MemberMetadata]) -> int:
    """Return the frames of the longest videos that an ensemble is proved on.

    They are as long as videos of its records can be, because what rounding does to a table of
    positions shows in late frames only. A foreign member runs on no longer videos than those that
    it was imported with.
    """
    proved = [member.mapping.max_frames for member in members if member.mapping is not None]
    longest = schema.max_frames if schema.level == "frame" else 1
    return min([longest, MOST_FRAMES, *proved])


def example_frames(
    schema: Schema, batch_size: int, length: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return random frames to compare two forms of a model with, the same on every call.

    Returns:
        Frames ``(batch_size, length, D)`` of each modality in the schema's value type, and
        ``num_frames`` ``(batch_size,)`` from 1 to ``length``.
    """
    generator = torch.Generator().manual_seed(batch_size)
    frames: dict[str, Tensor] = {}
    for modality in schema.modalities:
        shape = (batch_size, length, modality.width)
        frames[modality.name] = (
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            if modality.value_type == "uint8"
            else torch.randn(shape, generator=generator)
        )
    return frames, torch.randint(1, length + 1, (batch_size,), generator=generator)
