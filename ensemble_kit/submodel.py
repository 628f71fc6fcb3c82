"""The one wiring of parts into a sub-model: frames of each modality -> probabilities.

Imports ``layers``, ``recipes`` and ``data.schema``. The tables below name every part; a recipe
picks from them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import RecipeError
from ensemble_kit.layers.average_pooling import AveragePooling
from ensemble_kit.layers.context_gating import ContextGating
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.layers.frame_sampling import AllFrames, RandomSampling, UniformSampling
from ensemble_kit.layers.heads import Logistic, MixtureOfExperts
from ensemble_kit.layers.hidden_projection import HiddenProjection
from ensemble_kit.layers.netvlad import NetVLAD
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.recurrent import GRU
from ensemble_kit.layers.soft_bof import SoftBoF
from ensemble_kit.recipes import Recipe, Table, for_modality

SAMPLINGS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"all": AllFrames, "random": RandomSampling, "uniform": UniformSampling}
)
SET_POOLINGS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"average": AveragePooling, "netvlad": NetVLAD, "soft_bof": SoftBoF}
)
SEQUENCE_POOLINGS: Mapping[str, type[nn.Module]] = MappingProxyType({"gru": GRU})
GATINGS: Mapping[str, type[nn.Module]] = MappingProxyType({"context_gating": ContextGating})
HEADS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"logistic": Logistic, "mixture_of_experts": MixtureOfExperts}
)
WITHOUT_BATCH_NORM = frozenset({"average", "gru"})
WIRING_KEYS = frozenset({"name", "modality_fusion", "probability_gating"})
JOINT = "joint"


class Size(NamedTuple):
    """How large a sub-model is.

    Attributes:
        parameters: Trainable numbers.
        values: Stored numbers: parameters and the statistics of batch norm.
    """

    parameters: int
    values: int


class SubModel(nn.Module):
    """A recipe built for a schema.

    ::

        prepared joint frames -> sampling -> input batch norm -> pooling, of each modality (late)
        or of the joint frame (early) -> concatenation -> hidden projection -> gating -> head
        -> probability gating -> mean over repeats

    Sampling is a weighting: a set pooling describes each frame once and aggregates R times, and
    whatever follows it runs R times; a sequence pooling runs once.

    Args:
        recipe: The parts and their arguments.
        schema: Widths and the number of classes.

    Raises:
        RecipeError: The recipe does not fit the schema's modalities, or samples frames at random
            for a pooling that reads them in order.
    """

    def __init__(self, recipe: Recipe, schema: Schema) -> None:
        super().__init__()
        self.recipe = recipe
        self.schema = schema
        self.is_sequential = recipe.pooling.name in SEQUENCE_POOLINGS
        momentum = recipe.training.batch_norm_momentum
        self.sampling = SAMPLINGS[recipe.sampling.name](**_arguments(recipe.sampling))
        if self.is_sequential and recipe.sampling.name != "all":
            raise RecipeError(
                f"Recipe {recipe.name}: sampling.name is {recipe.sampling.name!r}, but "
                f"{recipe.pooling.name} reads the frames in order.",
                mend="Use --set 'sampling={name=\"all\"}'.",
            )
        streams = schema.widths
        if recipe.pooling.modality_fusion == "early":
            streams = {JOINT: sum(schema.widths.values())}
        self.stream_widths = list(streams.values())
        self.input_batch_norm = (
            BatchNorm(num_features=sum(self.stream_widths), momentum=momentum)
            if recipe.input.batch_norm
            else None
        )
        self.poolings = nn.ModuleDict(
            {name: self._pooling(name, width, momentum) for name, width in streams.items()}
        )
        parts: list[Any] = list(self.poolings.values())
        features = sum(part.output_size for part in parts)
        self.hidden: HiddenProjection | None = None
        self.gating: nn.Module | None = None
        if recipe.hidden is not None:
            self.hidden = HiddenProjection(
                num_features=features,
                size=recipe.hidden.size,
                fan_in=parts[0].projection_fan_in,
            )
            features = recipe.hidden.size
            if recipe.hidden.gating != "none":
                gating = GATINGS[recipe.hidden.gating]
                self.gating = gating(num_features=features, momentum=momentum)
        self.head = HEADS[recipe.head.name](
            num_features=features, num_classes=schema.num_classes, **_arguments(recipe.head)
        )
        self.probability_gating = (
            ContextGating(num_features=schema.num_classes, momentum=momentum)
            if recipe.head.probability_gating
            else None
        )

    @property
    def num_draws(self) -> int | None:
        """N, the frames drawn at random in one repeat; None where nothing is drawn."""
        is_random = isinstance(self.sampling, RandomSampling)
        return self.recipe.sampling.num_frames if is_random else None  # type: ignore[union-attr]

    def forward(
        self, frames: Mapping[str, Tensor], num_frames: Tensor, draws: Tensor | None = None
    ) -> Tensor:
        """Return the probability of every class.

        Args:
            frames: ``(B, T, D)`` for each modality of the schema, uint8 or floating point.
            num_frames: ``(B,)``, integers; what lies beyond is padding and changes nothing.
            draws: Uniform numbers ``(R, N)`` or ``(B, R, N)`` for random sampling; None draws
                once afresh. Ignored where nothing is drawn.

        Returns:
            ``(B, C)`` in [0, 1]: the mean of R repeats.
        """
        ordered = {name: frames[name] for name in self.schema.widths}
        joint, is_frame = prepare_frames(ordered, num_frames)
        return self.classify(joint, is_frame, draws)

    def classify(self, joint: Tensor, is_frame: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return probabilities for frames that ``prepare_frames`` has prepared.

        A fused graph prepares the frames once and calls this of each member.
        """
        weights = self.sampling(is_frame, draws)  # (B, R, T)
        row_weights = weights[:, 0] if self.training else weights[:, 0].detach()
        values = joint.to(self._dtype())
        if self.input_batch_norm is not None:
            values = self.input_batch_norm(values, row_weights)
        pooled = [
            self._pool(pooling, stream, weights, row_weights, is_frame)
            for pooling, stream in zip(
                self.poolings.values(), torch.split(values, self.stream_widths, dim=-1), strict=True
            )
        ]
        features = torch.cat(pooled, dim=-1) if len(pooled) > 1 else pooled[0]
        if self.hidden is not None:
            features = self.hidden(features)
        if self.gating is not None:
            features = self.gating(features)
        probabilities = self.head(features)
        if self.probability_gating is not None:
            probabilities = self.probability_gating(probabilities)
        return probabilities.mean(dim=1)  # type: ignore[no-any-return]

    def regularised(self) -> list[Tensor]:
        """Return the kernels that the L2 penalty applies to: the head's."""
        return self.head.regularised()  # type: ignore[operator, no-any-return]

    def _pool(
        self,
        pooling: Any,
        frames: Tensor,
        weights: Tensor,
        row_weights: Tensor,
        is_frame: Tensor,
    ) -> Tensor:
        if self.is_sequential:
            return pooling(frames, is_frame.sum(dim=1)).unsqueeze(1)  # type: ignore[no-any-return]
        return pooling.aggregate(pooling.describe(frames, row_weights), weights)  # type: ignore[no-any-return]

    def _pooling(self, modality: str, width: int, momentum: float) -> nn.Module:
        name = self.recipe.pooling.name
        arguments = {
            key: for_modality(value, modality, key=f"pooling.{key}")
            if isinstance(value, dict)
            else value
            for key, value in _arguments(self.recipe.pooling).items()
        }
        if name not in WITHOUT_BATCH_NORM:
            arguments["momentum"] = momentum
        part = SEQUENCE_POOLINGS[name] if self.is_sequential else SET_POOLINGS[name]
        return part(num_features=width, **arguments)

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def measure_recipe(recipe: Recipe, schema: Schema) -> Size:
    """Return the size of a recipe built for a schema, without memory for its weights."""
    with torch.device("meta"):
        model = SubModel(recipe, schema)
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        values=sum(tensor.numel() for tensor in model.state_dict().values()),
    )


def _arguments(table: Table) -> dict[str, Any]:
    return {key: value for key, value in dict(table).items() if key not in WIRING_KEYS}
