from itertools import product

import pytest
import torch
from builders import HEADS, POOLINGS, stir, tiny_frames, tiny_model, tiny_recipe, tiny_schema
from reference import (
    fixed_norm_loops,
    gating_loops,
    moe_loops,
    netvlad_loops,
    prepare_loops,
    product_loops,
    random_indices_loops,
    softmax_loops,
)
from torch import nn

from ensemble_kit.errors import RecipeError
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.recipes import load_recipe
from ensemble_kit.submodel import SubModel, measure_recipe

LENGTHS = [7, 4, 1]
FUSED = ("late", "early")
GATED = (False, True)
COMBINATIONS = [
    pytest.param(
        {
            "pooling": pooling,
            "modality_fusion": fusion,
            "gating": gating,
            "head": head,
            "probability_gating": is_gated,
        },
        id=f"{pooling}-{fusion}-{gating}-{head}{'-gated' * is_gated}",
    )
    for pooling, fusion, gating, head, is_gated in [
        *product(["netvlad"], FUSED, (None, "none", "glu", "se", "context_gating"), HEADS, GATED),
        *product(
            [name for name in POOLINGS if name != "netvlad"], FUSED, (None,), ["logistic"], (False,)
        ),
    ]
]
YOUTUBE8M = tiny_schema(
    widths={"rgb": 1024, "audio": 128}, num_classes=3862, value_type="uint8"
)  # the 2018 release


def build(*, widths=None, **parts):
    schema = tiny_schema(widths=widths) if widths else tiny_schema()
    return tiny_model(tiny_recipe(**parts), schema).double()


def draws_for(model, repeats, rng):
    return None if model.num_draws is None else torch.rand(repeats, model.num_draws, generator=rng)


def norm_constants(norm):
    return [
        part.tolist() for part in (norm.running_mean, norm.running_variance, norm.scale, norm.shift)
    ]


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_a_score_is_a_probability_and_never_depends_on_batch_or_padding(parts, rng):
    model = build(**parts)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng, length=9)
    draws = draws_for(model, 3, rng)

    together = model(frames, num_frames, draws)

    assert together.shape == (3, 4)
    assert (together >= 0).all()
    assert (together <= 1).all()
    for video, length in enumerate(LENGTHS):
        alone = {name: values[video : video + 1, :length] for name, values in frames.items()}
        score = model(alone, num_frames[video : video + 1], draws)
        torch.testing.assert_close(together[video : video + 1], score)


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_gradients_reach_every_parameter(parts, rng):
    model = build(**parts).train()
    frames, num_frames = tiny_frames(model.schema, [7, 4, 5, 6], rng)

    (model(frames, num_frames) * torch.randn(4, 4, generator=rng)).sum().backward()

    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_the_parts_are_wired_as_the_papers_wire_them(rng):
    model = build(pooling="netvlad", probability_gating=True)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = torch.rand(2, 8, generator=rng)

    ours = model({name: values.double() for name, values in frames.items()}, num_frames, draws)

    for video, length in enumerate(LENGTHS):
        modalities = [frames[name][video].double().tolist() for name in ("rgb", "audio")]
        joint = [
            fixed_norm_loops(frame, *norm_constants(model.input_batch_norm))
            for frame in prepare_loops(modalities, length)
        ]
        repeats = [netvlad_sub_model_loops(model, joint, row, length) for row in draws.tolist()]
        paper = [sum(column) / len(repeats) for column in zip(*repeats, strict=True)]
        torch.testing.assert_close(ours[video].tolist(), paper)


def netvlad_sub_model_loops(model, joint, draws, length):
    """Late NetVLAD of rgb (5) and audio (3), hidden projection, gating, MoE, gating."""
    drawn = [joint[index] for index in random_indices_loops(draws, length)]
    features = []
    for name, columns in (("rgb", slice(0, 5)), ("audio", slice(5, 8))):
        pooling = model.poolings[f"stream_{name}"]
        weight, norm = pooling.assignment.weight.tolist(), pooling.assignment.batch_norm
        rows = [frame[columns] for frame in drawn]
        assignments = [
            softmax_loops(fixed_norm_loops(product_loops(row, weight), *norm_constants(norm)))
            for row in rows
        ]
        features += netvlad_loops(rows, assignments, pooling.centres.tolist())
    products = product_loops(features, model.hidden.weight.tolist())
    hidden = [x + b for x, b in zip(products, model.hidden.bias.tolist(), strict=True)]
    gated = context_gating_loops(hidden, model.gating)
    probabilities = moe_loops(
        gated,
        model.head.gates.weight.T.tolist(),
        model.head.experts.weight.T.tolist(),
        model.head.experts.bias.tolist(),
        2,
    )
    return context_gating_loops(probabilities, model.probability_gating)


def context_gating_loops(features, layer):
    logits = product_loops(features, layer.weight.tolist())
    return gating_loops(features, fixed_norm_loops(logits, *norm_constants(layer.batch_norm)))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("fusion", ["late", "early"])
@pytest.mark.parametrize(
    "widths", [{"audio": 3}, {"rgb": 5, "audio": 3}, {"rgb": 5, "audio": 3, "text": 2}]
)
def test_any_number_of_modalities_will_do(pooling, fusion, widths, rng):
    model = build(pooling=pooling, modality_fusion=fusion, widths=widths)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)

    scores = model(frames, num_frames, draws_for(model, 2, rng))

    assert scores.shape == (3, 4)
    streams = ["joint"] if fusion == "early" else widths
    assert list(model.poolings) == [f"stream_{name}" for name in streams]


def test_a_modality_may_be_named_like_a_part_of_the_container(rng):
    names = {"type": 5, "keys": 3, "train": 2, "stream_type": 4}
    assert all(hasattr(nn.ModuleDict, name) for name in ("type", "keys", "train"))
    model = build(pooling="average", widths=names)

    scores = model(*tiny_frames(model.schema, LENGTHS, rng))

    assert scores.shape == (3, 4)


@pytest.mark.parametrize("pooling", ["average", "soft_bof", "netvlad"])
def test_early_pooling_of_one_modality_is_late_pooling(pooling, rng):
    overrides = [] if pooling == "average" else ["pooling.num_clusters=3"]
    late, early = (
        tiny_model(
            tiny_recipe(pooling=pooling, modality_fusion=fusion, overrides=overrides),
            tiny_schema(widths={"audio": 3}),
        )
        for fusion in ("late", "early")
    )
    frames, num_frames = tiny_frames(late.schema, LENGTHS, rng)
    draws = draws_for(late, 2, rng)

    assert torch.equal(late(frames, num_frames, draws), early(frames, num_frames, draws))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_modalities_are_joined_in_the_schemas_order_and_others_are_ignored(pooling, rng):
    model = build(pooling=pooling, modality_fusion="early")
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = draws_for(model, 2, rng)
    turned = {"text": torch.ones(3, 7, 2), "audio": frames["audio"], "rgb": frames["rgb"]}

    assert torch.equal(model(turned, num_frames, draws), model(frames, num_frames, draws))


@pytest.mark.parametrize("pooling", ["soft_bof", "netvlad"])
def test_the_probabilities_of_repeats_are_averaged(pooling, rng):
    model = build(pooling=pooling, probability_gating=True)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = torch.rand(4, 8, generator=rng)

    together = model(frames, num_frames, draws)

    one_by_one = [model(frames, num_frames, row.unsqueeze(0)) for row in draws]
    torch.testing.assert_close(together, torch.stack(one_by_one).mean(dim=0))
    assert not torch.allclose(one_by_one[0], one_by_one[1])


@pytest.mark.parametrize("pooling", ["soft_bof", "netvlad"])
def test_random_frames_are_drawn_afresh_unless_draws_are_given(pooling, rng):
    model = build(pooling=pooling)
    frames, num_frames = tiny_frames(model.schema, [7, 7], rng)

    assert model.num_draws == 8
    assert not torch.equal(model(frames, num_frames), model(frames, num_frames))


@pytest.mark.parametrize("sampling", ["all", "uniform"])
def test_where_nothing_is_drawn_draws_are_ignored(sampling, rng):
    model = build(pooling="netvlad", sampling=sampling)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)

    assert model.num_draws is None
    assert torch.equal(
        model(frames, num_frames, torch.rand(3, 8, generator=rng)), model(frames, num_frames)
    )


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_a_video_of_no_frames_has_finite_probabilities(parts, rng):
    model = build(**parts)
    frames, num_frames = tiny_frames(model.schema, [4, 0], rng)
    frames["rgb"][1] = torch.nan

    scores = model(frames, num_frames, draws_for(model, 2, rng))

    assert scores.isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_frames_prepared_once_serve_as_well(pooling, rng):
    model = tiny_model(tiny_recipe(pooling=pooling), tiny_schema(value_type="uint8"))
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = draws_for(model, 2, rng)

    joint, is_frame = prepare_frames(frames, num_frames)

    assert torch.equal(model.classify(joint, is_frame, draws), model(frames, num_frames, draws))


def test_training_normalises_with_the_drawn_frames_only(rng):
    model = stir(SubModel(tiny_recipe(pooling="netvlad"), tiny_schema())).double()
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    joint, is_frame = prepare_frames(frames, num_frames)
    draws = torch.rand(3, 1, 8, generator=rng)
    norm = nn.BatchNorm1d(8, eps=1e-3, momentum=0.1).double()
    norm.running_mean.copy_(model.input_batch_norm.running_mean)
    norm.running_var.copy_(model.input_batch_norm.running_variance)

    model.train().classify(joint, is_frame, draws)

    norm(
        torch.cat(
            [
                joint[video, random_indices_loops(draws[video, 0].tolist(), length)].double()
                for video, length in enumerate(LENGTHS)
            ]
        )
    )
    torch.testing.assert_close(model.input_batch_norm.running_mean, norm.running_mean)
    torch.testing.assert_close(model.input_batch_norm.running_variance, norm.running_var)


def test_every_batch_norm_has_the_recipes_momentum():
    model = build(probability_gating=True, batch_norm_momentum=0.25)

    momenta = [part.momentum for part in model.modules() if hasattr(part, "momentum")]
    assert momenta == [0.25] * 5  # input, two assignments, two gatings


def test_the_hidden_layer_starts_with_the_scale_of_the_first_modalitys_clusters():
    overrides = ["pooling.num_clusters={rgb=64, audio=4}", "hidden.size=200"]

    model = tiny_model(tiny_recipe(overrides=overrides), tiny_schema())

    assert abs(model.hidden.weight.std().item() * 8 - 1) < 0.02  # 1 / sqrt(64)


def test_only_the_heads_kernels_are_regularised():
    model = build(probability_gating=True)

    kernels = {id(kernel) for kernel in model.regularised()}
    assert kernels == {id(model.head.gates.weight), id(model.head.experts.weight)}


def test_a_modality_that_the_recipe_has_no_value_for_is_named():
    with pytest.raises(RecipeError) as caught:
        build(overrides=["pooling.num_clusters={rgb=3}"])

    assert str(caught.value) == (
        "pooling.num_clusters has values for rgb, not for audio.\n"
        "Give it one with --set pooling.num_clusters.audio=NUMBER."
    )


@pytest.mark.parametrize(
    ("name", "parameters", "values"),
    [
        # Counted from the layers' shapes in the papers and their code. In fp32 the last three are
        # the sizes that table 1 of arXiv:1810.00207 gives: 109, 143 and 243 MiB.
        ("willow/average-logistic", 4_452_886, 4_452_886),
        ("mfb/average-concat", 22_252_844, 22_252_844),
        ("willow/average-moe-cg", 37_175_612, None),
        ("willow/gated-net-vlad", 321_528_380, None),
        ("nonlocal/soft-bof-4k", None, 28_572_796),
        ("nonlocal/soft-bof-8k", None, 37_358_796),
        # with the second biases of two layers, which the papers' cell does not have
        ("nonlocal/gru", 63_466_124 + 7_200, 63_466_124 + 7_200),
    ],
)
def test_recipes_have_the_papers_sizes(name, parameters, values):
    size = measure_recipe(load_recipe(name), YOUTUBE8M)

    assert parameters in (None, size.parameters)
    assert values in (None, size.values)


def test_a_size_counts_parameters_and_statistics():
    model = build()

    size = measure_recipe(model.recipe, model.schema)

    stored = model.state_dict().values()
    assert size.values == sum(tensor.numel() for tensor in stored)
    assert size.values - size.parameters == 2 * (8 + 3 + 2 + 6)  # input, assignments, gating
