"""Parts of another package at each place of a sub-model."""

import pytest
import torch
from builders import tiny_frames, tiny_recipe_text, tiny_schema

from ensemble_kit.errors import RecipeError
from ensemble_kit.networks.products import output_axes
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import parse_recipe
from ensemble_kit.store.provenance import RecipeMetadata

pytestmark = pytest.mark.usefixtures("own_package")
LENGTHS = [5, 3, 0]


def built(old, new, **parts):
    text = tiny_recipe_text(**{"pooling": "average", **parts}).replace(old, new)
    return SubModel(parse_recipe(RecipeMetadata(name="mine", text=text)), tiny_schema()).eval()


def message_of(pooling):
    with pytest.raises(RecipeError) as caught:
        built('name = "average"', pooling)
    return f"{caught.value.problem} {caught.value.hint}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "average"', 'name = "own-parts:first"\nscale = 2'),
        ('name = "average"', 'name = "own-parts:last"'),
        ('name = "all"', 'name = "own-parts:half"'),
        ("[head]", '[fusion]\nname = "own-parts:sum"\n[head]'),
        ('"context_gating"', '{ name = "own-parts:scale", by = 0.5 }'),
        ('name = "logistic"', 'name = "own-parts:softmax"'),
    ],
    ids=["set pooling", "sequence pooling", "sampling", "fusion", "gating", "head"],
)
def test_a_sub_model_takes_a_part_of_another_package_at_each_place(rng, old, new):
    model = built(old, new, head="logistic")
    frames, counts = tiny_frames(model.schema, LENGTHS, rng)

    probabilities = model(frames, counts)

    assert probabilities.shape == (3, 4)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    changed = {name: frame.clone() for name, frame in frames.items()}
    for frame in changed.values():
        frame[1, 3:] = 9  # padding
    torch.testing.assert_close(model(changed, counts), probabilities)


def test_an_own_head_is_the_one_that_computes(rng):
    model = built('name = "logistic"', 'name = "own-parts:softmax"', head="logistic")
    frames, counts = tiny_frames(model.schema, LENGTHS, rng)

    torch.testing.assert_close(model(frames, counts).sum(dim=1), torch.ones(3))


def test_an_own_sampling_is_left_to_the_model_not_to_the_reader():
    assert built('name = "all"', 'name = "own-parts:half"').frame_choice is None


def test_a_part_says_which_of_its_matrices_are_no_products():
    axes = output_axes(built('name = "average"', 'name = "own-parts:first"\nscale = 2'))

    assert axes
    assert not [name for name in axes if name.endswith("scales")]


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (
            'name = "own-parts:first"\nscale = 13',
            "pooling.scale is 13 for rgb, but 13 brings bad luck. Set pooling.scale of rgb to 12.",
        ),
        (
            'name = "own-parts:first"\nscale = 14',
            "The part own-parts:first cannot be built: OSError: no disk. Correct the package, or "
            "the recipe's keys for it.",
        ),
        (
            'name = "own-parts:lame"',
            "The part own-parts:lame has no output_size and no projection_fan_in and no "
            "loops_over_repeats and no aggregate. Give it what ensemble_kit.parts.SetPooling "
            "describes.",
        ),
    ],
    ids=["argument", "constructor", "contract"],
)
def test_an_own_part_that_cannot_be_used_is_refused_by_name(pooling, message):
    assert message_of(pooling) == message
