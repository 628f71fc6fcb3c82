from math import cos, pi

import pytest
import torch
from builders import tiny_recipe, tiny_schema
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import clip_loops

from ensemble_kit.errors import RecipeError
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.training.optimisation import (
    Optimiser,
    clip_each,
    clip_together,
    learning_rate_at,
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(0.1, 10),
)
def test_each_gradient_is_clipped_by_its_own_norm(gradients, limit):
    tensors = [torch.tensor(gradient, dtype=torch.float64) for gradient in gradients]

    clip_each(tensors, limit)

    for tensor, gradient in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(tensor.tolist(), clip_loops(gradient, limit))


def test_the_learning_rate_is_a_staircase_in_examples():
    schedule = tiny_recipe(
        learning_rate=0.5, learning_rate_decay=0.8, examples_per_decay=100
    ).training

    rates = [learning_rate_at(schedule, examples) for examples in (0, 99, 100, 199, 200, 1050)]

    assert rates == [0.5, 0.5, 0.5 * 0.8, 0.5 * 0.8, 0.5 * 0.8**2, 0.5 * 0.8**10]


def test_a_cosine_falls_to_nothing_with_the_last_step():
    schedule = tiny_recipe(
        learning_rate=0.5, max_steps=10, batch_size=8, overrides=["training.schedule=cosine"]
    ).training

    rates = [learning_rate_at(schedule, examples) for examples in (0, 20, 40, 80)]

    assert rates == pytest.approx([0.5, 0.25 * (1 + cos(pi / 4)), 0.25, 0.0])


@pytest.mark.parametrize("kind", ["staircase", "cosine"])
def test_a_warm_up_rises_from_the_first_batch_on(kind):
    overrides = [f"training.schedule={kind}"]
    plain = tiny_recipe(batch_size=8, examples_per_decay=16, overrides=overrides).training
    warm = tiny_recipe(
        batch_size=8, examples_per_decay=16, overrides=[*overrides, "training.warmup_examples=32"]
    ).training

    shares = [
        learning_rate_at(warm, examples) / learning_rate_at(plain, examples)
        for examples in (0, 8, 16, 24, 32, 40)
    ]

    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(0.1, 10),
)
def test_gradients_can_be_clipped_by_the_norm_of_all(gradients, limit):
    tensors = [torch.tensor(gradient, dtype=torch.float64) for gradient in gradients]

    clip_together(tensors, limit)

    joint = clip_loops([value for gradient in gradients for value in gradient], limit)
    torch.testing.assert_close(torch.cat(tensors).tolist(), joint)


FACTORS = "training.learning_rate_factors={pooling = 0.25, head = 4.0}"


def stepped(optimiser, model, steps):
    for step in steps:
        optimiser.clear()
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimiser.step(0)


def optimised(overrides):
    recipe = tiny_recipe(probability_gating=True, overrides=overrides)
    torch.manual_seed(0)
    model = SubModel(recipe, tiny_schema())
    return model, Optimiser(model, recipe.training)


def test_a_part_has_its_own_multiple_of_the_learning_rate():
    moved = []
    for overrides in ([], [FACTORS]):
        model, optimiser = optimised(overrides)
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        stepped(optimiser, model, [1])
        moved.append({n: each.detach() - before[n] for n, each in model.named_parameters()})

    plain, scaled = moved
    for name, change in plain.items():
        part = name.partition(".")[0]
        factor = {"poolings": 0.25, "head": 4.0, "probability_gating": 4.0}.get(part, 1.0)
        torch.testing.assert_close(scaled[name], factor * change, rtol=1e-3, atol=1e-7)


def test_moments_of_parts_with_their_own_rates_are_saved_by_name():
    whole, optimiser = optimised([FACTORS])
    stepped(optimiser, whole, [1, 2, 3])

    model, first = optimised([FACTORS])
    stepped(first, model, [1, 2])
    second = Optimiser(model, tiny_recipe(overrides=[FACTORS]).training)
    second.restore(dict(first.tensors()))
    stepped(second, model, [3])

    for name, expected in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name


def test_a_factor_of_a_part_without_weights_is_refused():
    with pytest.raises(RecipeError, match="fusion, of which the model has no weights") as caught:
        optimised(["training.learning_rate_factors.fusion=2.0"])

    assert caught.value.hint == "Name one of: head, hidden, input, pooling."
