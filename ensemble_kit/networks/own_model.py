"""A whole model of another package, trained and shipped as a sub-model is."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import RecipeError
from ensemble_kit.layers.frame_preparation import PreparedFrames, prepare_frames
from ensemble_kit.layers.protocols import Model
from ensemble_kit.networks.parts import MODELS, arguments_of, build_part
from ensemble_kit.recipes.reading import ModelRecipe


class OwnModel(nn.Module):
    """A recipe whose model is no composition of parts.

    It reads every frame, draws nothing, and runs once whatever the number of repeats.

    Args:
        recipe: The model and its arguments.
        schema: The modalities with their widths, and the number of classes.

    Raises:
        RecipeError: The model is missing, fails, or is no ``nn.Module``.
    """

    num_draws = None
    loops_over_repeats = False
    frame_choice = None

    def __init__(self, recipe: ModelRecipe, schema: Schema) -> None:
        super().__init__()
        self.recipe = recipe
        self.schema = schema
        self.model: Model = build_part(
            MODELS,
            recipe.model.name,
            arguments_of(recipe.model),
            {
                "widths": MappingProxyType(schema.widths),
                "num_classes": schema.num_classes,
                "momentum": recipe.training.batch_norm_momentum,
            },
        )

    def draws_for(self, name: str, *, repeats: int) -> Tensor | None:
        """Return None: nothing is drawn."""
        return None

    def forward(
        self,
        frames: Mapping[str, Tensor],
        num_frames: Tensor,
        draws: Tensor | None = None,
        frame_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the probability of every class; see ``SubModel.forward``."""
        return self.classify(prepare_frames(self.schema.ordered(frames), num_frames))

    def classify(self, prepared: PreparedFrames, draws: Tensor | None = None) -> Tensor:
        """Return probabilities for frames that ``prepare_frames`` has prepared.

        Raises:
            RecipeError: The model returns another shape than ``(B, C)``.
        """
        widths = self.schema.widths
        split = torch.split(prepared.joint, list(widths.values()), dim=-1)
        frames = dict(zip(widths, split, strict=True))
        probabilities = self.model(frames, prepared.is_frame.sum(dim=1))
        expected = prepared.is_frame.shape[0], self.schema.num_classes
        if tuple(probabilities.shape) != expected:
            raise RecipeError(
                f"The model {self.recipe.model.name} returned numbers of shape "
                f"{tuple(probabilities.shape)}, not {expected}: one for each video and class.",
                hint="Correct the package.",
            )
        return probabilities

    def penalty(self) -> Tensor | None:
        """Return nothing: only a fusion of modalities adds to the loss."""
        return None

    def regularised(self) -> list[Tensor]:
        """Return the kernels that the L2 penalty applies to."""
        return self.model.regularised()
