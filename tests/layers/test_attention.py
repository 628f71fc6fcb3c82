from math import sqrt

import pytest
import torch
from builders import stir
from reference import (
    affine_loops,
    fixed_norm_loops,
    heads_loops,
    l2_loops,
    layer_norm_loops,
    product_loops,
    residual_sums_loops,
    softmax_loops,
)
from torch import nn

from ensemble_kit.layers.attention import (
    AttentionNetVLAD,
    ClusterEncoder,
    Encoder,
    MultiHeadAttention,
)

FEATURES, HEADS, CLUSTERS, ROWS = 6, 2, 3, 5
LENGTHS = [5, 2, 1]
VARIANTS = [
    pytest.param(
        before, after, similarity, id=f"{similarity}{'-before' * before}{'-after' * after}"
    )
    for before in (False, True)
    for after in (False, True)
    for similarity in ("softmax", "attention")
]


def ready(layer):
    """Give every norm and bias something to show, and take it to float64."""
    for part in layer.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.data.uniform_(0.5, 2.0)
        bias = getattr(part, "bias", None)
        if bias is not None:
            bias.data.normal_()
    return stir(layer).double()


def multi_head(num_rows=None):
    torch.manual_seed(0)
    return ready(
        MultiHeadAttention(num_features=FEATURES, num_heads=HEADS, momentum=0.1, num_rows=num_rows)
    )


def encoder():
    torch.manual_seed(0)
    return ready(Encoder(num_features=FEATURES, num_heads=HEADS, momentum=0.1))


def cluster_encoder():
    torch.manual_seed(0)
    return ready(
        ClusterEncoder(
            num_features=FEATURES,
            num_clusters=CLUSTERS,
            num_heads=HEADS,
            num_frames=ROWS,
            momentum=0.1,
        )
    )


def netvlad(encode_frames, encode_clusters, similarity):
    torch.manual_seed(0)
    return ready(
        AttentionNetVLAD(
            num_features=FEATURES,
            num_clusters=CLUSTERS,
            num_heads=HEADS,
            encode_frames=encode_frames,
            encode_clusters=encode_clusters,
            similarity=similarity,
            num_frames=ROWS,
            momentum=0.1,
        )
    )


BUILDERS = [multi_head, lambda: multi_head(ROWS), encoder, cluster_encoder]
WHOLE = [BUILDERS[1], BUILDERS[3]]  # in training, all rows of a set or none
NAMES = ["attention", "attention with normalised logits", "encoder", "cluster encoder"]


def linear_loops(layer, rows):
    return [affine_loops(row, layer.weight.T.tolist(), layer.bias.tolist()) for row in rows]


def norm_loops(norm, rows):
    return [fixed_norm_loops(row, *constants(norm)) for row in rows]


def constants(norm, count=None):
    """Mean, variance, scale and shift of a batch norm, of its first features."""
    return [
        part.tolist()[:count]
        for part in (norm.running_mean, norm.running_variance, norm.scale, norm.shift)
    ]


def relu_loops(rows):
    return [[max(x, 0.0) for x in row] for row in rows]


def added_loops(rows, others):
    return [[x + y for x, y in zip(*pair, strict=True)] for pair in zip(rows, others, strict=True)]


def attention_loops(layer, rows):
    projections = [part.weight.T.tolist() for part in (layer.queries, layer.keys, layer.values)]
    logit_norm = None if layer.logit_norm is None else constants(layer.logit_norm, len(rows))
    attended = heads_loops(rows, projections, HEADS, logit_norm)
    return linear_loops(layer.output, norm_loops(layer.head_norm, attended))


def residual_loops(norm, rows, change):
    return [
        layer_norm_loops(row, norm.weight.tolist(), norm.bias.tolist())
        for row in added_loops(rows, change)
    ]


def encoder_loops(layer, rows):
    attended = residual_loops(layer.attention_norm, rows, attention_loops(layer.attention, rows))
    wide = relu_loops(linear_loops(layer.widen, attended))
    return residual_loops(layer.norm, attended, linear_loops(layer.narrow, wide))


def cluster_encoder_loops(layer, rows):
    attended = residual_loops(layer.attention_norm, rows, attention_loops(layer.attention, rows))
    wide = norm_loops(layer.wide_norm, relu_loops(linear_loops(layer.widen, attended)))
    return norm_loops(layer.norm, relu_loops(linear_loops(layer.narrow, wide)))


def assignment_loops(layer, rows):
    logits = norm_loops(
        layer.batch_norm, [product_loops(row, layer.weight.tolist()) for row in rows]
    )
    return [softmax_loops(row) for row in logits]


def netvlad_loops(layer, rows):
    if layer.frame_encoder is not None:
        rows = encoder_loops(layer.frame_encoder, rows)
    similar = (
        cluster_encoder_loops if isinstance(layer.assignment, ClusterEncoder) else assignment_loops
    )
    sums = residual_sums_loops(rows, similar(layer.assignment, rows), layer.centres.tolist())
    clusters = [l2_loops(row) for row in sums]
    if layer.cluster_encoder is not None:
        clusters = encoder_loops(layer.cluster_encoder, clusters)
    return l2_loops([x for row in clusters for x in row])


LOOPS = [attention_loops, attention_loops, encoder_loops, cluster_encoder_loops]
PAIRS = list(zip(BUILDERS, LOOPS, strict=True))


@pytest.fixture
def rows(rng):
    return torch.randn(3, ROWS, FEATURES, generator=rng, dtype=torch.float64)


@pytest.fixture
def num_rows():
    return torch.tensor(LENGTHS)


@pytest.fixture
def is_row(num_rows):
    return torch.arange(ROWS) < num_rows.unsqueeze(1)


@pytest.mark.parametrize(("build", "loops"), PAIRS, ids=NAMES)
def test_matches_the_papers_equations_over_the_rows_there_are(build, loops, rows, is_row):
    layer = build().eval()

    ours = layer(rows, is_row)

    for video, length in enumerate(LENGTHS):
        paper = loops(layer, rows[video, :length].tolist())
        torch.testing.assert_close(ours[video, :length].tolist(), paper)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_padded_rows_change_nothing(build, is_training, rows, is_row):
    if is_training and build in WHOLE:
        is_row = torch.tensor([[True], [False], [True]]).expand(-1, ROWS)
    layer, again = build().train(is_training), build().train(is_training)
    spoilt = rows.masked_fill(~is_row.unsqueeze(-1), 30.0)

    clean, other = layer(rows, is_row), again(spoilt, is_row)

    torch.testing.assert_close(clean[is_row], other[is_row])
    for (name, one), two in zip(
        layer.state_dict().items(), again.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, msg=name)


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_a_set_of_no_rows_is_finite_and_changes_no_other_in_training(build, rows, is_row):
    layer, again = build().train(), build().train()
    if build in WHOLE:
        is_row = torch.ones_like(is_row)
    none = torch.zeros(1, ROWS, dtype=torch.bool)

    alone = layer(rows, is_row)
    together = again(torch.cat([rows, rows[:1] + 7]), torch.cat([is_row, none]))

    assert together.isfinite().all()
    torch.testing.assert_close(together[:3][is_row], alone[is_row])


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_gradients_reach_every_parameter(build, rows, is_row, rng):
    layer = build().train()
    encoded = layer(rows, is_row)

    (encoded * torch.randn(encoded.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize(("before", "after", "similarity"), VARIANTS)
def test_netvlad_with_attention_matches_the_papers_equations(
    before, after, similarity, rows, num_rows
):
    layer = netvlad(before, after, similarity).eval()

    ours = layer(rows, num_rows)

    for video, length in enumerate(LENGTHS):
        paper = netvlad_loops(layer, rows[video, :length].tolist())
        torch.testing.assert_close(ours[video].tolist(), paper)
    assert ours.shape == (3, layer.output_size) == (3, CLUSTERS * FEATURES)
    assert layer.projection_fan_in == CLUSTERS


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(("before", "after", "similarity"), VARIANTS)
def test_netvlad_with_attention_never_sees_padding(
    before, after, similarity, is_training, rows, num_rows, is_row
):
    if is_training and similarity == "attention":
        num_rows = torch.tensor([ROWS, 0, ROWS])
        is_row = torch.arange(ROWS) < num_rows.unsqueeze(1)
    layer = netvlad(before, after, similarity).train(is_training)
    again = netvlad(before, after, similarity).train(is_training)

    clean = layer(rows, num_rows)
    spoilt = again(rows.masked_fill(~is_row.unsqueeze(-1), 30.0), num_rows)

    torch.testing.assert_close(spoilt, clean)


@pytest.mark.parametrize(("before", "after", "similarity"), VARIANTS)
def test_netvlad_with_attention_is_zero_for_no_frames(before, after, similarity, rows):
    layer = netvlad(before, after, similarity).eval()

    ours = layer(rows, torch.tensor([5, 0, 2]))

    assert ours[1].count_nonzero() == 0
    torch.testing.assert_close(ours.norm(dim=1).tolist(), [1.0, 0.0, 1.0])


@pytest.mark.parametrize(("before", "after", "similarity"), VARIANTS)
def test_gradients_reach_every_parameter_of_netvlad_with_attention(
    before, after, similarity, rows, num_rows, rng
):
    layer = netvlad(before, after, similarity).train()
    pooled = layer(rows, num_rows)

    (pooled * torch.randn(pooled.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_without_normalised_logits_the_order_of_rows_only_orders_the_output(rows):
    layer, is_row = encoder().eval(), torch.ones(3, ROWS, dtype=torch.bool)

    torch.testing.assert_close(layer(rows.flip(1), is_row), layer(rows, is_row).flip(1))


def test_one_head_is_not_two(rows, is_row):
    layer = multi_head().eval()
    two = layer(rows, is_row)

    layer.num_heads = 1

    assert not torch.allclose(layer(rows, is_row), two)


def test_linear_maps_start_glorot_uniform_and_biases_at_zero():
    torch.manual_seed(0)
    encoders = [
        Encoder(num_features=64, num_heads=4, momentum=0.1),
        ClusterEncoder(num_features=64, num_clusters=48, num_heads=4, num_frames=9, momentum=0.1),
    ]

    maps = [part for one in encoders for part in one.modules() if isinstance(part, nn.Linear)]
    assert len(maps) == 12
    for part in maps:
        limit = sqrt(6 / (part.in_features + part.out_features))
        assert 0.99 * limit < part.weight.abs().max() <= limit
        assert abs(part.weight.std() * sqrt(3) / limit - 1) < 0.03
        assert part.bias is None or part.bias.count_nonzero() == 0


def test_centres_start_on_the_scale_of_unit_frames():
    torch.manual_seed(0)
    layer = AttentionNetVLAD(
        num_features=400,
        num_clusters=30,
        num_heads=4,
        encode_frames=False,
        encode_clusters=False,
        similarity="softmax",
        num_frames=9,
        momentum=0.1,
    )

    assert abs(layer.centres.std().item() * 20 - 1) < 0.03  # 1 / sqrt(400)


def test_attention_similarities_need_a_number_of_frames():
    with pytest.raises(
        ValueError,
        match=r"^similarity: attention over frames needs a fixed number of them, and all are read$",
    ):
        AttentionNetVLAD(
            num_features=FEATURES,
            num_clusters=CLUSTERS,
            num_heads=HEADS,
            encode_frames=False,
            encode_clusters=False,
            similarity="attention",
            num_frames=None,
            momentum=0.1,
        )
