from itertools import product

import pytest
import torch
from builders import (
    HEADS,
    IN_ORDER,
    POOLINGS,
    stir,
    tiny_frames,
    tiny_model,
    tiny_recipe,
    tiny_schema,
)
from reference import (
    fixed_norm_loops,
    gating_loops,
    moe_loops,
    netvlad_loops,
    prepare_loops,
    product_loops,
    random_indices_loops,
    sequence_indices_loops,
    softmax_loops,
    uniform_indices_loops,
)
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ensemble_kit.errors import RecipeError
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.networks.building import measure_recipe
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import load_recipe

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


def sampled_sequence(pooling="gru", sampling="random", **parts):
    """A sequence pooling after a batch norm of the sampled frames."""
    return build(pooling=pooling, sampling=sampling, batch_norm=True, **parts)


def message_of(*overrides, widths=None, **parts):
    with pytest.raises(RecipeError) as caught:
        build(widths=widths, overrides=overrides, **parts)
    return str(caught.value)


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


@pytest.mark.parametrize("pooling", [name for name in POOLINGS if name != "average"])
def test_the_probabilities_of_repeats_are_averaged(pooling, rng):
    model = build(pooling=pooling, sampling="random", probability_gating=True)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = torch.rand(4, 8, generator=rng)

    together = model(frames, num_frames, draws)

    one_by_one = [model(frames, num_frames, row.unsqueeze(0)) for row in draws]
    torch.testing.assert_close(together, torch.stack(one_by_one).mean(dim=0))
    assert not torch.allclose(one_by_one[0], one_by_one[1])


@pytest.mark.parametrize("pooling", ["soft_bof", "netvlad", "lstm", "attention_netvlad"])
def test_random_frames_are_drawn_afresh_unless_draws_are_given(pooling, rng):
    model = build(pooling=pooling, sampling="random")
    frames, num_frames = tiny_frames(model.schema, [7, 7], rng)

    assert model.num_draws == 8
    assert not torch.equal(model(frames, num_frames), model(frames, num_frames))


@pytest.mark.parametrize("pooling", ["netvlad", "bigru"])
@pytest.mark.parametrize("sampling", ["all", "uniform"])
def test_where_nothing_is_drawn_draws_are_ignored(pooling, sampling, rng):
    model = build(pooling=pooling, sampling=sampling)
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


@pytest.mark.parametrize(
    ("sampling", "num_draws", "indices"),
    [
        ("random", 8, lambda draws, length: random_indices_loops(draws, length)),
        ("random_sequence", 1, lambda draws, length: sequence_indices_loops(draws[0], length, 5)),
        ("uniform", None, lambda _, length: uniform_indices_loops(6, length)),
    ],
)
@pytest.mark.parametrize("pooling", IN_ORDER)
def test_sequences_are_read_in_the_order_in_which_they_are_sampled(
    pooling, sampling, num_draws, indices, rng
):
    model = sampled_sequence(pooling, sampling)
    whole = sampled_sequence(pooling, "all")
    whole.load_state_dict(model.state_dict())
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = None if num_draws is None else torch.rand(3, 2, num_draws, generator=rng)

    ours = model(frames, num_frames, draws)

    assert model.num_draws == num_draws
    for video, length in enumerate(LENGTHS):
        repeats = [None] if draws is None else draws[video].tolist()
        chosen = [indices(row, length) for row in repeats]
        read = [
            whole({name: v[video : video + 1, index] for name, v in frames.items()},
                  torch.tensor([len(index)]))
            for index in chosen
        ]  # fmt: skip
        torch.testing.assert_close(ours[video], torch.cat(read).mean(dim=0))


@pytest.mark.parametrize("sampling", ["random", "random_sequence", "uniform"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_frames_chosen_while_reading_train_as_the_frames_sampled_do(pooling, sampling, rng):
    model, again = (sampled_sequence(pooling, sampling).double().train() for _ in range(2))
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    choice = model.frame_choice
    draws = torch.rand(3, 1, choice.num_draws, generator=rng)
    taken = [choice.take(d[0].numpy(), n) for d, n in zip(draws, LENGTHS, strict=True)]
    rows = pad_sequence([torch.from_numpy(rows) for rows, _ in taken], batch_first=True)
    weights = pad_sequence([torch.from_numpy(own) for _, own in taken], batch_first=True)
    chosen = {name: values[torch.arange(3)[:, None], rows] for name, values in frames.items()}

    sampled = model(frames, num_frames, draws)
    read = again(chosen, torch.tensor([len(own) for own, _ in taken]), frame_weights=weights)

    torch.testing.assert_close(read, sampled)
    torch.testing.assert_close(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("pooling", ["netvlad", "lstm", "attention_netvlad"])
@pytest.mark.parametrize("sampling", ["random", "random_sequence"])
def test_training_draws_once_for_all_that_reads_the_frames(pooling, sampling, rng):
    model, again = (sampled_sequence(pooling, sampling).train() for _ in range(2))
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    torch.manual_seed(5)
    draws = torch.rand(3, 1, model.num_draws)
    torch.manual_seed(5)

    drawn = model(frames, num_frames)

    torch.testing.assert_close(drawn, again(frames, num_frames, draws))
    torch.testing.assert_close(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("pooling", [*IN_ORDER, "attention_netvlad"])
@pytest.mark.parametrize("sampling", ["random", "random_sequence", "uniform"])
def test_a_sampled_sequence_never_depends_on_batch_or_padding(pooling, sampling, rng):
    model = sampled_sequence(
        pooling,
        sampling,
        overrides=["pooling.similarity=softmax"] if pooling == "attention_netvlad" else (),
    )
    lengths = [7, 0, 1, 4]
    frames, num_frames = tiny_frames(model.schema, lengths, rng, length=9)
    draws = draws_for(model, 3, rng)

    together = model(frames, num_frames, draws)

    assert together.isfinite().all()
    for video, length in enumerate(lengths):
        alone = {name: v[video : video + 1, : max(length, 1)] for name, v in frames.items()}
        score = model(alone, num_frames[video : video + 1], draws)
        torch.testing.assert_close(together[video : video + 1], score)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_frames_prepared_once_serve_as_well(pooling, rng):
    model = tiny_model(tiny_recipe(pooling=pooling), tiny_schema(value_type="uint8"))
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = draws_for(model, 2, rng)

    prepared = prepare_frames(frames, num_frames)

    assert torch.equal(model.classify(prepared, draws), model(frames, num_frames, draws))


def test_training_normalises_with_the_drawn_frames_only(rng):
    model = stir(SubModel(tiny_recipe(pooling="netvlad"), tiny_schema())).double()
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    prepared = prepare_frames(frames, num_frames)
    draws = torch.rand(3, 1, 8, generator=rng)
    norm = nn.BatchNorm1d(8, eps=1e-3, momentum=0.1).double()
    norm.running_mean.copy_(model.input_batch_norm.running_mean)
    norm.running_var.copy_(model.input_batch_norm.running_variance)

    model.train().classify(prepared, draws)

    norm(
        torch.cat(
            [
                prepared.normalised[
                    video, random_indices_loops(draws[video, 0].tolist(), length)
                ].double()
                for video, length in enumerate(LENGTHS)
            ]
        )
    )
    torch.testing.assert_close(model.input_batch_norm.running_mean, norm.running_mean)
    torch.testing.assert_close(model.input_batch_norm.running_variance, norm.running_var)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_a_recipe_says_whether_frames_are_normalised(is_normalised, rng):
    overrides = [f"input.l2_normalise={str(is_normalised).lower()}"]
    model = build(pooling="average", gating=None, overrides=overrides)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    seen = []
    model.head.register_forward_pre_hook(lambda _, values: seen.append(values[0]))

    model(frames, num_frames)

    for video, length in enumerate(LENGTHS):
        streams = [values[video].tolist() for values in frames.values()]
        rows = torch.tensor(prepare_loops(streams, length)[:length])
        if not is_normalised:
            rows = torch.cat([values[video, :length] for values in frames.values()], dim=-1)
        torch.testing.assert_close(seen[0][video, 0], rows.mean(dim=0).double())


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
    ("table", "message"),
    [
        (
            "fusion={name='mfb', size=4, factors=2, dropout=0.1}",
            "fusion.name is 'mfb', but the modalities are joined before pooling.\n"
            "Use --set pooling.modality_fusion=late, or leave out the fusion.",
        ),
        (
            "fusion={name='single', modality='rgb'}",
            "fusion.name is 'single', but the modalities are joined before pooling.\n"
            "Use --set pooling.modality_fusion=late, or leave out the fusion.",
        ),
    ],
)
def test_what_is_joined_before_pooling_is_not_fused_after_it(table, message):
    assert message_of(table, modality_fusion="early") == f"Recipe tiny: {message}"


def test_a_single_modality_that_is_not_there_is_named():
    assert message_of("fusion={name='single', modality='text'}") == (
        "Recipe tiny: fusion.modality is 'text', but these records hold rgb, audio.\n"
        "Use --set fusion.modality=rgb."
    )


@pytest.mark.parametrize(
    "table",
    [
        "{name='mfb', size=4, factors=2, dropout=0.1}",
        "{name='projection', size=4, penalty=0.1}",
    ],
)
@pytest.mark.parametrize("widths", [{"audio": 3}, {"rgb": 5, "audio": 3, "text": 2}])
def test_a_fusion_of_two_modalities_asks_for_two(table, widths):
    name = table.split("'")[1]
    assert message_of(f"fusion={table}", widths=widths) == (
        f"Recipe tiny: fusion.name is {name!r}, which joins 2 modalities, but these records hold "
        f"{len(widths)}: {', '.join(widths)}.\n"
        "Use records of 2 modalities, or another fusion."
    )


@pytest.mark.parametrize("modality", ["rgb", "audio"])
@pytest.mark.parametrize("pooling", ["netvlad", "gru"])
def test_a_single_modality_is_read_alone_but_normalised_with_all(pooling, modality, rng):
    table = f"fusion={{name='single', modality='{modality}'}}"
    model = build(pooling=pooling, batch_norm=True, overrides=[table])
    both = build(pooling=pooling, batch_norm=True)
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    other = {"rgb": "audio", "audio": "rgb"}[modality]
    turned = frames | {other: -frames[other]}  # of the same length
    draws = draws_for(model, 2, rng)

    scores = model(frames, num_frames, draws)

    torch.testing.assert_close(model(turned, num_frames, draws), scores)
    assert not torch.allclose(model(frames | {other: 9 * frames[other]}, num_frames, draws), scores)
    assert not torch.allclose(both(turned, num_frames, draws), both(frames, num_frames, draws))
    assert model.input_batch_norm.scale.shape == (model.schema.widths[modality],)


@pytest.mark.parametrize("fusion", ["concat", "fc_concat", "shared", "mfb", "projection"])
@pytest.mark.parametrize("pooling", ["netvlad", "lstm"])
def test_modality_fusions_stand_between_pooling_and_head(pooling, fusion, rng):
    arguments = {
        "concat": "",
        "mfb": ", size=7, factors=2, dropout=0.1",
        "projection": ", size=7, penalty=0.5",
    }.get(fusion, ", size=7")
    model = build(pooling=pooling, overrides=[f"fusion={{name='{fusion}'{arguments}}}"])
    frames, num_frames = tiny_frames(model.schema, LENGTHS, rng)
    draws = draws_for(model, 2, rng)

    scores = model(frames, num_frames, draws)

    fused = {"fc_concat": 14, "shared": 7, "mfb": 7, "projection": 14}
    width = fused.get(fusion, sum(part.output_size for part in model.poolings.values()))
    assert model.hidden.weight.shape == (width, 6)
    for video, length in enumerate(LENGTHS):
        alone = {name: values[video : video + 1, :length] for name, values in frames.items()}
        score = model(alone, num_frames[video : video + 1], draws)
        torch.testing.assert_close(scores[video : video + 1], score)
    assert model.penalty() is None
    model.train()(frames, num_frames)
    assert (model.penalty() is None) == (fusion != "projection")


def test_the_diagonal_of_a_gate_that_is_not_there_is_refused():
    for gating in ("glu", "se", "none"):
        assert message_of("hidden.remove_diagonal=true", gating=gating) == (
            f"Recipe tiny: hidden.remove_diagonal is true, but hidden.gating is {gating!r}.\n"
            "Use --set hidden.gating=context_gating, or leave out hidden.remove_diagonal."
        )
    assert message_of("head.remove_diagonal=true") == (
        "Recipe tiny: head.remove_diagonal is true, but head.probability_gating is false.\n"
        "Use --set head.probability_gating=true, or leave out head.remove_diagonal."
    )


def test_the_diagonals_of_gates_are_left_out():
    model = build(
        probability_gating=True,
        overrides=["hidden.remove_diagonal=true", "head.remove_diagonal=true"],
    )

    assert model.gating.remove_diagonal is model.probability_gating.remove_diagonal is True


def test_the_hidden_projection_has_what_the_recipe_says():
    overrides = ["hidden.batch_norm=true", "hidden.dropout=0.25", "hidden.activation=relu6"]
    full, plain = build(overrides=overrides).hidden, build().hidden

    assert (full.bias, full.batch_norm.momentum) == (None, 0.1)
    assert (full.has_relu6, full.dropout.p) == (True, 0.25)
    assert (plain.batch_norm, plain.dropout, plain.has_relu6) == (None, None, False)
    assert plain.bias.shape == (6,)


@pytest.mark.parametrize(
    ("name", "overrides", "parameters"),
    [
        # S4 after and before-and-after, with one encoder and with two; the recurrent cells with
        # the second biases of two layers, which TensorFlow's have not
        ("attention/attention-enhanced", ["pooling.encode_frames=false"], 161_907_116),
        ("attention/attention-netvlad", ["pooling.encode_frames=false"], 158_465_388),
        ("willow/lstm", ["pooling.state=last"], 37_090_860 + 8_192),
    ],
)
def test_variants_of_recipes_have_the_papers_sizes(name, overrides, parameters):
    assert measure_recipe(load_recipe(name, overrides), YOUTUBE8M).parameters == parameters


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
