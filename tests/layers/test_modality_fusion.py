from math import sqrt

import pytest
import torch
from reference import affine_loops, distance_loops, mfb_loops, product_loops

from ensemble_kit.layers.modality_fusion import MFB, Concat, FCConcat, Projection, SharedSpace

SIZES = (5, 3)


def build(fusion, **arguments):
    torch.manual_seed(0)
    layer = fusion(sizes=SIZES, **arguments).double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


@pytest.fixture
def pooled(rng):
    """Descriptors of two modalities, four videos in two repeats."""
    return [torch.randn(4, 2, size, generator=rng, dtype=torch.float64) for size in SIZES]


def rows_of(tensor):
    return tensor.flatten(0, 1).tolist()


def affine(layer, rows):
    return [affine_loops(row, layer.weight.T.tolist(), layer.bias.tolist()) for row in rows]


def test_concat_is_the_modalities_side_by_side(pooled):
    layer = Concat(sizes=SIZES)

    for left, right, joined in zip(*map(rows_of, pooled), rows_of(layer(pooled)), strict=True):
        assert joined == left + right
    assert layer.output_size == 8


def test_one_modality_passes_through(pooled):
    layer = Concat(sizes=[5])

    assert torch.equal(layer(pooled[:1]), pooled[0])
    assert layer.output_size == 5


def test_fc_concat_is_each_modality_projected_then_side_by_side(pooled):
    layer = build(FCConcat, size=6)

    ours = layer(pooled)

    parts = [affine(one, rows_of(p)) for one, p in zip(layer.projections, pooled, strict=True)]
    for left, right, joined in zip(*parts, rows_of(ours), strict=True):
        torch.testing.assert_close(joined, left + right)
    assert ours.shape[-1] == layer.output_size == 12


@pytest.mark.parametrize("is_training", [False, True])
def test_mfb_matches_the_paper_equations(is_training, pooled):
    layer = build(MFB, size=4, factors=3, dropout=0.0 if is_training else 0.5)

    ours = layer.train(is_training)(pooled)

    parts = [affine(one, rows_of(p)) for one, p in zip(layer.projections, pooled, strict=True)]
    for left, right, fused in zip(*parts, rows_of(ours), strict=True):
        torch.testing.assert_close(fused, mfb_loops(left, right, 3))
    assert ours.shape[-1] == layer.output_size == 4
    assert (ours == 0).any()
    assert (ours > 0).any()


def test_mfb_drops_products_and_only_in_training(pooled):
    layer = build(MFB, size=4, factors=3, dropout=0.5)
    left, right = (one(p) for one, p in zip(layer.projections, pooled, strict=True))
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(torch.ones_like(left), 0.5)  # 2 where kept, 0 elsewhere

    torch.manual_seed(1)
    ours = layer(pooled)

    products = zip(rows_of(left * kept), rows_of(right), rows_of(ours), strict=True)
    for one, other, fused in products:
        torch.testing.assert_close(fused, mfb_loops(one, other, 3))
    assert not torch.equal(layer(pooled), layer(pooled))
    assert torch.equal(layer.eval()(pooled), layer(pooled))


def test_shared_space_is_one_layer_over_both_modalities(pooled):
    layer = build(SharedSpace, size=4)

    ours = layer(pooled)

    matrix = [row for weight in layer.weights for row in weight.tolist()]
    for left, right, shared in zip(*map(rows_of, pooled), rows_of(ours), strict=True):
        logits = torch.tensor(
            affine_loops(left + right, matrix, layer.bias.tolist()), dtype=torch.float64
        )
        torch.testing.assert_close(shared, logits.tanh().tolist())
    assert ours.shape[-1] == layer.output_size == 4


def test_projection_is_both_mappings_side_by_side_and_its_penalty_their_distance(pooled):
    layer = build(Projection, size=4, penalty=0.25)

    ours = layer(pooled)

    mapped = [
        [product_loops(row, weight.tolist()) for row in rows_of(p)]
        for weight, p in zip(layer.weights, pooled, strict=True)
    ]
    for left, right, joined in zip(*mapped, rows_of(ours), strict=True):
        torch.testing.assert_close(joined, left + right)
    torch.testing.assert_close(layer.last_penalty.item(), 0.25 * distance_loops(*mapped))
    assert ours.shape[-1] == layer.output_size == 8


def test_the_penalty_is_of_the_last_batch_in_training(pooled):
    layer = build(Projection, size=4, penalty=0.25)
    layer.eval()(pooled)
    assert layer.last_penalty is None

    layer.train()(pooled)
    first = layer.last_penalty
    layer.eval()([2 * values for values in pooled])
    assert layer.last_penalty is first

    layer.train()([2 * values for values in pooled])
    torch.testing.assert_close(layer.last_penalty, 4 * first)


def test_the_penalty_draws_the_mappings_together(pooled):
    layer = build(Projection, size=4, penalty=0.25)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05)
    penalties = []

    for _ in range(20):
        layer(pooled)
        penalties.append(layer.last_penalty.item())
        optimiser.zero_grad()
        layer.last_penalty.backward()
        optimiser.step()

    assert penalties == sorted(penalties, reverse=True)
    assert penalties[-1] < 0.5 * penalties[0]


@pytest.mark.parametrize(
    ("fusion", "arguments"),
    [
        (FCConcat, {"size": 6}),
        (MFB, {"size": 4, "factors": 3, "dropout": 0.1}),
        (SharedSpace, {"size": 4}),
        (Projection, {"size": 4, "penalty": 0.25}),
    ],
)
def test_gradients_reach_every_parameter(fusion, arguments, pooled, rng):
    layer = build(fusion, **arguments)
    fused = layer(pooled)

    (fused * torch.randn(fused.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_three_modalities_fit_where_the_equation_has_any_number(rng):
    pooled = [torch.randn(4, 1, size, generator=rng) for size in (5, 3, 2)]
    concat, fc_concat = Concat(sizes=[5, 3, 2]), FCConcat(sizes=[5, 3, 2], size=6)
    shared = SharedSpace(sizes=[5, 3, 2], size=6)

    assert concat(pooled).shape[-1] == concat.output_size == 10
    assert fc_concat(pooled).shape[-1] == fc_concat.output_size == 18
    assert shared(pooled).shape[-1] == shared.output_size == 6


def test_projections_start_glorot_uniform_and_mappings_at_a_hundredth():
    torch.manual_seed(0)
    projected = (
        FCConcat(sizes=(300, 200), size=100),
        MFB(sizes=(300, 200), size=20, factors=5, dropout=0.1),
    )
    mapped = (
        SharedSpace(sizes=(300, 200), size=100),
        Projection(sizes=(300, 200), size=100, penalty=1e-3),
    )

    for layer in projected:
        for width, projection in zip((300, 200), layer.projections, strict=True):
            limit = sqrt(6 / (width + 100))
            assert 0.99 * limit < projection.weight.abs().max() <= limit
            assert projection.bias.count_nonzero() == 0
    for layer in mapped:
        for weight in layer.weights:
            assert abs(weight.std().item() / 0.01 - 1) < 0.02
    assert mapped[0].bias.count_nonzero() == 0
