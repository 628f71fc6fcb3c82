"""The one wiring of parts into a sub-model: frames of each modality -> probabilities."""

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ensemble_kit.data.frame_choice import FrameChoice
from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import RecipeError
from ensemble_kit.layers.context_gating import ContextGating
from ensemble_kit.layers.frame_preparation import PreparedFrames, prepare_frames
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.layers.hidden_projection import HiddenProjection
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.protocols import (
    Fusion,
    Gating,
    Head,
    Sampling,
    SequencePooling,
    SetPooling,
)
from ensemble_kit.networks.parts import (
    FUSIONS,
    GATINGS,
    HEADS,
    SAMPLINGS,
    Stream,
    arguments_of,
    build_part,
    build_pooling,
    find_part,
    is_sequence_pooling,
    takes,
)
from ensemble_kit.recipes.reading import Recipe
from ensemble_kit.recipes.tables import AllFramesTable, HiddenTable, PartTable, SingleTable

JOINT = "joint"


class SubModel(nn.Module):
    """A recipe built for a schema.

    ::

        prepared joint frames -> sampling -> input batch norm -> pooling, of each modality (late)
        or of the joint frame (early) -> modality fusion -> hidden projection -> gating -> head
        -> probability gating -> mean over repeats

    Sampling is a weighting: a set pooling describes each frame once and aggregates the frames R
    times, and everything after it runs R times. A sequence pooling reads the sampled frames
    themselves, once for each repeat; where nothing is sampled it runs once.

    Args:
        recipe: The parts and their arguments.
        schema: The modalities with their widths, and the number of classes.

    Raises:
        RecipeError: The recipe does not fit the schema's modalities, or its parts do not fit
            together.
    """

    def __init__(self, recipe: Recipe, schema: Schema) -> None:
        super().__init__()
        _require_diagonals(recipe)
        self.recipe = recipe
        self.schema = schema
        self.is_sequential = is_sequence_pooling(recipe.pooling.name)
        self.streams = _streams(recipe, schema)
        momentum = recipe.training.batch_norm_momentum
        self.sampling: Sampling = build_part(
            SAMPLINGS, recipe.sampling.name, arguments_of(recipe.sampling), {}
        )
        self.input_batch_norm = (
            BatchNorm(
                num_features=sum(stop - start for start, stop in self.streams.values()),
                momentum=momentum,
            )
            if recipe.input.batch_norm
            else None
        )
        self.poolings = nn.ModuleDict()
        sizes, fan_ins = [], []
        for index, (name, (start, stop)) in enumerate(self.streams.items()):
            stream = Stream(name, stop - start, self.sampling.num_frames, is_first=index == 0)
            pooling = build_pooling(recipe.pooling, stream, momentum=momentum)
            self.poolings[pooling_name(name)] = cast(nn.Module, pooling)
            sizes.append(pooling.output_size)
            fan_ins.append(pooling.projection_fan_in)
        self.fusion: Fusion = build_part(
            FUSIONS,
            recipe.fusion.name if recipe.fusion else "concat",
            arguments_of(recipe.fusion) if recipe.fusion else {},
            {"sizes": sizes},
        )
        _require_modalities(recipe, self.fusion, self.streams)
        features = self.fusion.output_size
        self.hidden: HiddenProjection | None = None
        self.gating: Gating | None = None
        if recipe.hidden is not None:
            self.hidden = _hidden_projection(recipe.hidden, features, fan_ins[0], momentum)
            features = recipe.hidden.size
            self.gating = _gating(recipe.hidden, momentum)
        self.head: Head = build_part(
            HEADS,
            recipe.head.name,
            arguments_of(recipe.head),
            {"num_features": features, "num_classes": schema.num_classes},
        )
        self.probability_gating = (
            ContextGating(
                num_features=schema.num_classes,
                momentum=momentum,
                remove_diagonal=bool(recipe.head.remove_diagonal),
            )
            if recipe.head.probability_gating
            else None
        )

    @property
    def num_draws(self) -> int | None:
        """How many uniform numbers one repeat uses; None where nothing is drawn."""
        return self.sampling.num_draws

    @property
    def loops_over_repeats(self) -> bool:
        """Whether an exported graph serves one number of repeats only."""
        return not self.is_sequential and any(part.loops_over_repeats for part in self._sets)

    @property
    def frame_choice(self) -> FrameChoice | None:
        """The sampling as a rule for copying frames while records are read; None reads all."""
        table = self.recipe.sampling
        if isinstance(table, AllFramesTable | PartTable):
            return None
        return FrameChoice(table.name, table.num_frames, in_order=self.is_sequential)

    def draws_for(self, name: str, *, repeats: int) -> Tensor | None:
        """Return the fixed uniform numbers ``(R, N)`` of a member of this name.

        None if nothing is drawn.
        """
        if self.num_draws is None:
            return None
        return draw_table(name, repeats=repeats, num_frames=self.num_draws)

    def forward(
        self,
        frames: Mapping[str, Tensor],
        num_frames: Tensor,
        draws: Tensor | None = None,
        frame_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the probability of every class.

        Args:
            frames: ``(B, T, D)`` for each modality of the schema, uint8 or floating point.
            num_frames: ``(B,)``, integers; frames from there on are padding and change nothing.
            draws: Uniform numbers ``(R, N)`` or ``(B, R, N)`` for random sampling; None draws one
                repeat. Ignored where nothing is drawn.
            frame_weights: ``(B, T)``, float32, for frames that ``frame_choice`` has chosen: how
                often each was drawn. Such frames are not sampled again.

        Returns:
            ``(B, C)`` in [0, 1]: the mean of R repeats.
        """
        return self.classify(
            prepare_frames(self.schema.ordered(frames), num_frames), draws, frame_weights
        )

    def classify(
        self,
        prepared: PreparedFrames,
        draws: Tensor | None = None,
        frame_weights: Tensor | None = None,
    ) -> Tensor:
        """Return probabilities for frames that ``prepare_frames`` has prepared.

        A fused graph prepares the frames once and calls this for each member.
        """
        joint = prepared.normalised if self.recipe.input.l2_normalise else prepared.joint
        values = joint.to(next(self.parameters()).dtype)
        starts, stops = zip(*self.streams.values(), strict=True)
        values = values[..., starts[0] : stops[-1]]  # all of it, or one modality alone
        weights, indices = self._sample(prepared.is_frame, draws, frame_weights)
        if self.input_batch_norm is not None:
            values = self.input_batch_norm(values, weights[:, 0])
        sizes = [stop - start for start, stop in self.streams.values()]
        split = torch.split(values, sizes, dim=-1)
        if self.is_sequential:
            pooled = self._pool_sequences(split, prepared.is_frame, indices)
        else:
            pooled = [
                pooling.aggregate(pooling.describe(stream, weights[:, 0]), weights)
                for pooling, stream in zip(self._sets, split, strict=True)
            ]
        features = self.fusion(pooled)
        if self.hidden is not None:
            features = self.hidden(features)
        if self.gating is not None:
            features = self.gating(features)
        probabilities = self.head(features)
        if self.probability_gating is not None:
            probabilities = self.probability_gating(probabilities)
        return probabilities.mean(dim=1)

    def penalty(self) -> Tensor | None:
        """Return what the modality fusion adds to the loss of the last batch, or None."""
        return self.fusion.last_penalty

    def regularised(self) -> list[Tensor]:
        """Return the kernels that the L2 penalty applies to: the head's."""
        return self.head.regularised()

    # ModuleDict forgets what its modules are, and a model pools sets or sequences, never both.
    @property
    def _sets(self) -> list[SetPooling]:
        return [cast(SetPooling, pooling) for pooling in self.poolings.values()]

    @property
    def _sequences(self) -> list[SequencePooling]:
        return [cast(SequencePooling, pooling) for pooling in self.poolings.values()]

    def _sample(
        self, is_frame: Tensor, draws: Tensor | None, frame_weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the frame weights ``(B, R, T)`` and the indices ``(B, R, N)`` of a sequence.

        The indices are None for a set pooling, and where a sequence takes all frames as they are.
        """
        if frame_weights is not None:
            return frame_weights.unsqueeze(1), None
        if draws is None and self.num_draws is not None:  # the same draw for weights and indices
            draws = torch.rand(is_frame.shape[0], 1, self.num_draws, device=is_frame.device)
        weights = self.sampling(is_frame, draws)
        return weights, self.sampling.indices(is_frame, draws) if self.is_sequential else None

    def _pool_sequences(
        self, streams: tuple[Tensor, ...], is_frame: Tensor, indices: Tensor | None
    ) -> list[Tensor]:
        """Run sequence poolings on the sampled frames; each returns ``(B, R, F)``."""
        lengths = is_frame.sum(dim=1)
        if indices is None:
            pairs = zip(self._sequences, streams, strict=True)
            return [pooling(stream, lengths).unsqueeze(1) for pooling, stream in pairs]
        batch, repeats, count = indices.shape
        flat = indices.flatten(1).unsqueeze(-1)
        lengths = ((lengths > 0) * count).unsqueeze(1).expand(-1, repeats).reshape(-1)
        pooled = []
        for pooling, stream in zip(self._sequences, streams, strict=True):
            frames = stream.gather(1, flat.expand(-1, -1, stream.shape[-1]))
            rows = pooling(frames.reshape(batch * repeats, count, stream.shape[-1]), lengths)
            pooled.append(rows.reshape(batch, repeats, -1))
        return pooled


def pooling_name(stream: str) -> str:
    """Return the key of a stream's pooling, because ModuleDict reserves ``type`` and ``keys``."""
    return f"stream_{stream}"


def _streams(recipe: Recipe, schema: Schema) -> dict[str, tuple[int, int]]:
    """Return the slice of the joint frame that each pooling reads, by stream name.

    Raises:
        RecipeError: The modality fusion does not fit the schema's modalities.
    """
    slices = {}
    start = 0
    for name, width in schema.widths.items():
        slices[name] = (start, start + width)
        start += width
    fusion = recipe.fusion
    if recipe.pooling.modality_fusion == "early":
        if fusion is not None and fusion.name != "concat":
            raise RecipeError(
                f"Recipe {recipe.name}: fusion.name is {fusion.name!r}, but the modalities are "
                "joined before pooling.",
                hint="Use --set pooling.modality_fusion=late, or leave out the fusion.",
            )
        return {JOINT: (0, start)}
    if isinstance(fusion, SingleTable):
        if fusion.modality not in slices:
            raise RecipeError(
                f"Recipe {recipe.name}: fusion.modality is {fusion.modality!r}, but these records "
                f"hold {', '.join(slices)}.",
                hint=f"Use --set fusion.modality={next(iter(slices))}.",
            )
        return {fusion.modality: slices[fusion.modality]}
    return slices


def _require_modalities(recipe: Recipe, fusion: Fusion, streams: Collection[str]) -> None:
    """Refuse a modality fusion that joins another number of modalities than there are."""
    needed = fusion.num_modalities
    if recipe.fusion is not None and needed not in {None, len(streams)}:
        raise RecipeError(
            f"Recipe {recipe.name}: fusion.name is {recipe.fusion.name!r}, which joins {needed} "
            f"modalities, but these records hold {len(streams)}: {', '.join(streams)}.",
            hint=f"Use records of {needed} modalities, or another fusion.",
        )


def _require_diagonals(recipe: Recipe) -> None:
    """Refuse ``remove_diagonal`` without the gating whose diagonal it removes."""
    hidden, head = recipe.hidden, recipe.head
    if hidden is not None and hidden.remove_diagonal and not _has_diagonal(hidden.gating_name):
        raise RecipeError(
            f"Recipe {recipe.name}: hidden.remove_diagonal is true, but hidden.gating is "
            f"{hidden.gating_name!r}.",
            hint="Use --set hidden.gating=context_gating, or leave out hidden.remove_diagonal.",
        )
    if head.remove_diagonal and not head.probability_gating:
        raise RecipeError(
            f"Recipe {recipe.name}: head.remove_diagonal is true, but head.probability_gating is "
            "false.",
            hint="Use --set head.probability_gating=true, or leave out head.remove_diagonal.",
        )


def _hidden_projection(
    table: HiddenTable, features: int, fan_in: int, momentum: float
) -> HiddenProjection:
    return HiddenProjection(
        num_features=features,
        size=table.size,
        fan_in=fan_in,
        batch_norm_momentum=momentum if table.batch_norm else None,
        has_relu6=table.activation == "relu6",
        dropout=table.dropout or 0.0,
    )


def _has_diagonal(gating: str) -> bool:
    return gating != "none" and takes(find_part(GATINGS, gating), "remove_diagonal")


def _gating(table: HiddenTable, momentum: float) -> Gating | None:
    if table.gating_name == "none":
        return None
    own = arguments_of(table.gating) if isinstance(table.gating, PartTable) else {}
    extra = {"remove_diagonal": True} if table.remove_diagonal else {}
    offered = {"num_features": table.size, "momentum": momentum}
    return build_part(GATINGS, table.gating_name, own | extra, offered)
