from itertools import islice

import numpy as np
import pytest
import torch
from builders import POOLINGS, tiny_recipe, tiny_records, train_tiny

from ensemble_kit.networks.running import to_torch
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import load_recipe
from ensemble_kit.training.gradients import Differentiator
from ensemble_kit.training.plan import RunPlan
from ensemble_kit.training.processes import Processes


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


def gradients_of(records, folder, recipe, *, dtype=torch.float64, **options):
    """Return the loss of one batch, and the gradients of a model that is new."""
    torch.manual_seed(0)
    model = SubModel(recipe, records[0].schema).to(dtype).train()
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


@pytest.mark.parametrize("option", ["mixup=0.5", "label_smoothing=0.1"])
def test_a_recipe_may_mix_and_smooth_what_is_learnt(option, records, tmp_path):
    plain, _ = gradients_of(records, tmp_path, tiny_recipe(pooling="soft_bof"))
    recipe = tiny_recipe(pooling="soft_bof", overrides=[f"training.{option}"])
    loss, gradients = gradients_of(records, tmp_path, recipe)

    assert loss != pytest.approx(plain)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bfloat16_rounds_products_and_neither_statistics_nor_probabilities(pooling, records):
    recipe = tiny_recipe(pooling=pooling, probability_gating=True)
    (batch,) = islice(records[0].batches(16), 1)
    found = {}
    for is_rounded in (False, True):
        torch.manual_seed(0)
        model = SubModel(recipe, records[0].schema).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_rounded):
            probabilities = model(*to_torch(batch, "cpu"), model.draws_for("tiny", repeats=1))
        probabilities.square().sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found[is_rounded] = probabilities, gradient, model.state_dict()

    (exact, gradient, state), (rounded, rounded_gradient, rounded_state) = found.values()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    # bfloat16 has 8 bits, and attention's batch norms divide by small deviations
    assert torch.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.95
    for name, value in state.items():
        assert rounded_state[name].dtype == torch.float32
        torch.testing.assert_close(rounded_state[name], value, rtol=0.02, atol=0.02)


def test_precision_and_compilation_are_options(records, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    recipe = tiny_recipe(pooling="soft_bof")

    exact, gradient = gradients_of(records, tmp_path, recipe, dtype=torch.float32)
    assert compiled == []
    rounded, rounded_gradient = gradients_of(
        records, tmp_path, recipe, dtype=torch.float32, precision="bf16", compiled=True
    )

    assert [type(model) for model in compiled] == [SubModel]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert all(gradient[name].dtype == torch.float32 for name in rounded_gradient)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # in torch itself
def test_a_compiled_recipe_has_the_loss_and_the_gradients_of_a_plain_one(records, tmp_path):
    recipe = load_recipe("demo/soft-bof")
    options = {"dtype": torch.float32}

    loss, plain = gradients_of(records, tmp_path, recipe, **options)
    compiled_loss, compiled = gradients_of(records, tmp_path, recipe, compiled=True, **options)

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert len(plain) > 5
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_trains_in_bfloat16_compiled(records, tmp_path):
    options = {"device": "cuda", "precision": "bf16", "compiled": True}

    for pooling in ("netvlad", "gru"):
        recipe = tiny_recipe(pooling=pooling, max_steps=30, checkpoint_every=30)
        trained = train_tiny(tmp_path / pooling, records, recipe, is_validated=True, **options)
        assert trained.best_gap > 0.5


def test_a_teacher_is_in_the_loss(records, tmp_path):
    recipe = tiny_recipe(pooling="average", gating=None)
    ids = [video.id for video in records[0].videos()]
    certain = np.ones((len(ids), 5), np.float32)
    np.savez(tmp_path / "teacher.npz", probabilities=certain, ids=np.array(ids))
    options = {"teacher": tmp_path / "teacher.npz", "teacher_share": 0.25}

    loss, _ = gradients_of(records, tmp_path, recipe)
    taught, _ = gradients_of(records, tmp_path, recipe, **options)
    by_teacher, _ = gradients_of(records, tmp_path, recipe, **(options | {"teacher_share": 1}))

    assert by_teacher != pytest.approx(loss)
    assert taught == pytest.approx(0.75 * loss + 0.25 * by_teacher, rel=1e-6)
