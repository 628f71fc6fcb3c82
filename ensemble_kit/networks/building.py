"""From a recipe and a schema to its model: on paper, measured, or in memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch

from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import RecipeError
from ensemble_kit.files import format_size
from ensemble_kit.networks.own_model import OwnModel
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import AnyRecipe, ModelRecipe

TrainedModel: TypeAlias = SubModel | OwnModel
TRAINING_BYTES = 16  # of a weight: itself, its gradient and two moments in float32


class Size(NamedTuple):
    """How large a sub-model is.

    Attributes:
        parameters: Trainable numbers.
        values: Stored numbers: parameters and the statistics of batch norm.
    """

    parameters: int
    values: int


def build_model(recipe: AnyRecipe, schema: Schema) -> TrainedModel:
    """Build the model of a recipe, its weights at their start.

    Raises:
        RecipeError: It does not fit the schema, or its parts do not fit together.
    """
    return OwnModel(recipe, schema) if isinstance(recipe, ModelRecipe) else SubModel(recipe, schema)


@contextmanager
def without_memory(name: str) -> Iterator[None]:
    """Build a model in a block on the meta device, where a tensor has a shape and no memory.

    Args:
        name: What errors call the recipe.

    Raises:
        RecipeError: A tensor has more numbers than PyTorch counts.
    """
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, TypeError) as error:  # PyTorch's, about sizes of more than 63 bits
        raise RecipeError(
            f"Recipe {name} cannot be built: {str(error).splitlines()[0].rstrip('.')}.",
            hint="Use smaller sizes.",
        ) from error


def empty_model(recipe: AnyRecipe, schema: Schema) -> TrainedModel:
    """Build a recipe's model on the meta device, without allocating its weights.

    Raises:
        RecipeError: It does not fit the schema, or a tensor has more numbers than PyTorch counts.
    """
    with without_memory(recipe.name):
        return build_model(recipe, schema)


def trainable_model(recipe: AnyRecipe, schema: Schema) -> TrainedModel:
    """Build a recipe's model in memory, if this machine has enough to train it.

    Raises:
        RecipeError: See ``empty_model``; or this machine has less memory than the weights,
            their gradients and Adam's two moments take, 16 bytes for each number.
    """
    needed = TRAINING_BYTES * measure_recipe(recipe, schema).values
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise RecipeError(
            f"Recipe {recipe.name} takes at least {format_size(needed)} of memory in training; "
            f"this machine has {format_size(memory)}.",
            hint="Use smaller sizes, or train on a machine with more memory.",
        )
    return build_model(recipe, schema)


def measure_recipe(recipe: AnyRecipe, schema: Schema) -> Size:
    """Return the size of a recipe built for a schema, without allocating its weights.

    Raises:
        RecipeError: See ``empty_model``.
    """
    model = empty_model(recipe, schema)
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        values=sum(tensor.numel() for tensor in model.state_dict().values()),
    )
