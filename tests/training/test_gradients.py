from itertools import islice

import pytest
import torch
from builders import tiny_recipe, tiny_records

from ensemble_kit.submodel import SubModel
from ensemble_kit.training import RunPlan
from ensemble_kit.training.gradients import Differentiator
from ensemble_kit.training.processes import Processes


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


def gradients_of(records, folder, recipe, **options):
    """Return the loss of one batch, and the gradients of a model that is new."""
    torch.manual_seed(0)
    model = SubModel(recipe, records[0].schema).double().train()
    plan = RunPlan(
        recipe=recipe, training=records[0], validation=None, folder=folder / "tiny", **options
    )
    (batch,) = islice(records[0].training_batches(7, seed=0, choice=model.frame_choice), 1)
    loss = Differentiator(plan, model, Processes())(batch, [7])
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("parts", [3, 99])
@pytest.mark.parametrize("pooling", ["gru", "average"])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(pooling, parts, records, tmp_path):
    table = "fusion={name='projection', size=3, penalty=2.0}"  # part of the loss too
    recipe = tiny_recipe(
        pooling=pooling, gating=None, l2_penalty=0.1, overrides=[table]
    )  # nothing in it looks at other videos

    loss, whole = gradients_of(records, tmp_path, recipe)
    sum_of_losses, summed = gradients_of(records, tmp_path, recipe, accumulate=parts)

    assert sum_of_losses == pytest.approx(loss)
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient)
