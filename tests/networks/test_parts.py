from math import sqrt
from typing import get_args

import pytest
import torch
from builders import IN_ORDER, POOLINGS, tiny_recipe

from ensemble_kit.errors import RecipeError
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.networks import parts
from ensemble_kit.networks.parts import Stream, build_pooling
from ensemble_kit.recipes import tables as recipe_tables


def built(pooling, *overrides, modality="rgb", width=6, num_sampled=8, is_first=True):
    return build_pooling(
        tiny_recipe(pooling=pooling, overrides=overrides).pooling,
        Stream(modality, width, num_sampled, is_first),
        momentum=0.25,
    )


def message_of(pooling, *overrides, **stream):
    with pytest.raises(RecipeError) as caught:
        built(pooling, *overrides, **stream)
    return str(caught.value)


def names_in(union):
    members, _ = get_args(union)
    return {get_args(table.model_fields["name"].annotation)[0] for table in get_args(members)}


@pytest.mark.parametrize(
    ("tables", "union"),
    [
        ([parts.SAMPLINGS], recipe_tables.ShippedSampling),
        ([parts.SET_POOLINGS, parts.SEQUENCE_POOLINGS], recipe_tables.ShippedPooling),
        ([parts.FUSIONS], recipe_tables.ShippedFusion),
        ([parts.HEADS], recipe_tables.ShippedHead),
    ],
    ids=["sampling", "pooling", "fusion", "head"],
)
def test_recipes_can_name_every_part_and_no_other(tables, union):
    names = [name for table in tables for name in table]

    assert len(names) == len(set(names)) >= 2
    assert set(names) == names_in(union)


def test_recipes_can_name_every_gating_or_none():
    gatings = get_args(recipe_tables.ShippedGating)

    assert set(gatings) == {*parts.GATINGS, "none"}


def test_the_tests_build_every_pooling():
    assert POOLINGS.keys() == parts.SET_POOLINGS.keys() | parts.SEQUENCE_POOLINGS.keys()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_poolings_batch_norms_have_the_recipes_momentum(pooling):
    parts_of_it = list(built(pooling).modules())
    momenta = {part.momentum for part in parts_of_it if hasattr(part, "momentum")}

    has_batch_norm = pooling not in {"average", *IN_ORDER}
    assert momenta == ({0.25} if has_batch_norm else set())
    assert any(isinstance(part, BatchNorm) for part in parts_of_it) == has_batch_norm


@pytest.mark.parametrize("pooling", ["netvlad", "netrvlad"])
@pytest.mark.parametrize(
    ("inner_size", "expected_inner"), [("num_clusters", 3), ("half_features", 4), (7, 7)]
)
@pytest.mark.parametrize(
    ("temperature", "expected_temperature"), [("rsqrt_features", 1 / sqrt(9)), (0.25, 0.25)]
)
def test_the_non_local_block_is_sized_by_its_stream(
    pooling, inner_size, expected_inner, temperature, expected_temperature
):
    layer = built(
        pooling,
        f"pooling.non_local.inner_size={inner_size}",
        f"pooling.non_local.temperature={temperature}",
        width=9,
    )

    block = layer.non_local
    assert {tuple(sorted(p.shape)) for p in block.parameters()} == {
        tuple(sorted((9, expected_inner)))
    }
    assert block.temperature == expected_temperature
    assert (layer.centres is None) == (pooling == "netrvlad")


def test_gated_bof_gates_the_first_stream_alone(rng):
    gated, plain = built("gated_bof"), built("gated_bof", modality="audio", is_first=False)
    bag = built("soft_bof", modality="audio").eval()

    assert (gated.loops_over_repeats, plain.loops_over_repeats) == (True, False)
    assert plain.state_dict().keys() == bag.state_dict().keys() != gated.state_dict().keys()
    bag.load_state_dict(plain.eval().state_dict())
    frames, weights = torch.randn(3, 7, 6, generator=rng), torch.ones(3, 2, 7)
    assert torch.equal(
        plain.aggregate(plain.describe(frames, weights[:, 0]), weights),
        bag.aggregate(bag.describe(frames, weights[:, 0]), weights),
    )


def test_attention_over_softmax_takes_any_number_of_frames(rng):
    layer = built("attention_netvlad", "pooling.similarity=softmax", num_sampled=None).eval()

    for length in (2, 5):
        pooled = layer(torch.randn(1, length, 6, generator=rng), torch.tensor([length]))
        assert pooled.shape == (1, 18)


def test_attention_similarities_without_a_number_of_frames_are_refused():
    assert message_of("attention_netvlad", num_sampled=None) == (
        "pooling.similarity is 'attention' for rgb, but attention over frames needs a fixed number "
        "of them, and all are read.\n"
        "Set pooling.similarity of rgb to 'softmax', or sample a fixed number of frames "
        "(sampling.num_frames)."
    )


@pytest.mark.parametrize(
    ("pooling", "override", "width", "message"),
    [
        (
            "attention_netvlad",
            "pooling.num_heads=4",
            6,
            "pooling.num_heads is 4 for rgb, but 6 features do not divide into 4.\n"
            "Set pooling.num_heads of rgb to a divisor of 6.",
        ),
        (
            "nextvlad",
            "pooling.num_groups={rgb=4, other=2}",
            7,
            "pooling.num_groups is 4 for rgb, but 14 features do not divide into 4.\n"
            "Set pooling.num_groups of rgb to a divisor of 14.",
        ),
    ],
)
def test_features_that_do_not_divide_are_named(pooling, override, width, message):
    assert message_of(pooling, override, width=width) == message
