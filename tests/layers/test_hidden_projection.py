import pytest
import torch
from builders import stir
from poolings import statistics_of
from reference import affine_loops, batch_norm_loops, fixed_norm_loops, product_loops

from ensemble_kit.layers.hidden_projection import HiddenProjection


def test_is_linear_with_a_bias(rng):
    layer = HiddenProjection(num_features=5, size=3, fan_in=2).double()
    features = torch.randn(2, 1, 5, generator=rng, dtype=torch.float64)

    ours = layer(features)

    for row, hidden in zip(features[:, 0].tolist(), ours[:, 0], strict=True):
        products = product_loops(row, layer.weight.tolist())
        paper = [x + b for x, b in zip(products, layer.bias.tolist(), strict=True)]
        torch.testing.assert_close(hidden.tolist(), paper)


@pytest.mark.parametrize("has_relu6", [False, True])
def test_a_batch_norm_takes_the_place_of_the_bias(has_relu6, rng):
    torch.manual_seed(0)
    layer = HiddenProjection(
        num_features=5, size=3, fan_in=2, batch_norm_momentum=0.2, has_relu6=has_relu6
    )
    layer = stir(layer.double())
    layer.batch_norm.scale.data *= 4
    features = torch.randn(7, 1, 5, generator=rng, dtype=torch.float64)
    norm = layer.batch_norm
    statistics = statistics_of(norm)

    evaluated = layer.eval()(features)[:, 0].tolist()
    trained = layer.train()(features)[:, 0].tolist()

    products = [product_loops(row, layer.weight.tolist()) for row in features[:, 0].tolist()]
    fixed = [fixed_norm_loops(row, *statistics) for row in products]
    batch = batch_norm_loops(products, norm.scale.tolist(), norm.shift.tolist())
    for ours, paper in ((evaluated, fixed), (trained, batch)):
        assert min(map(min, paper)) < 0
        assert max(map(max, paper)) > 6
        if has_relu6:
            paper = [[min(max(x, 0.0), 6.0) for x in row] for row in paper]
        torch.testing.assert_close(ours, paper)
    assert layer.bias is None
    assert norm.momentum == 0.2


def test_relu6_alone_follows_the_bias(rng):
    layer = HiddenProjection(num_features=5, size=3, fan_in=2, has_relu6=True).double()
    features = 6 * torch.randn(4, 5, generator=rng, dtype=torch.float64)

    ours = layer(features).tolist()

    for row, hidden in zip(features.tolist(), ours, strict=True):
        paper = affine_loops(row, layer.weight.tolist(), layer.bias.tolist())
        torch.testing.assert_close(hidden, [min(max(x, 0.0), 6.0) for x in paper])
    assert {0.0, 6.0} < {x for row in ours for x in row}


def test_dropout_drops_features_before_the_projection_and_only_in_training(rng):
    torch.manual_seed(0)
    layer = HiddenProjection(num_features=5, size=3, fan_in=2, dropout=0.5).double()
    features = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(torch.ones_like(features), 0.5)  # 2 where kept, else 0

    torch.manual_seed(1)
    trained = layer(features)
    evaluated = layer.eval()(features)

    torch.testing.assert_close(trained, (features * kept) @ layer.weight + layer.bias)
    torch.testing.assert_close(evaluated, features @ layer.weight + layer.bias)


def test_without_dropout_training_is_evaluation(rng):
    layer = HiddenProjection(num_features=5, size=3, fan_in=2)
    features = torch.randn(4, 5, generator=rng)

    assert layer.dropout is None
    assert torch.equal(layer(features), layer.eval()(features))


def test_starts_with_the_scale_it_is_told_and_not_that_of_its_width():
    torch.manual_seed(0)
    layer = HiddenProjection(num_features=900, size=2000, fan_in=16)

    assert abs(layer.weight.std().item() / 0.25 - 1) < 0.02
    assert abs(layer.bias.std().item() / 0.01 - 1) < 0.05


def test_gradients_reach_every_parameter(rng):
    layer = HiddenProjection(num_features=5, size=3, fan_in=2)

    layer(torch.randn(4, 5, generator=rng)).sum().backward()

    assert layer.weight.grad.count_nonzero() == 15
    assert layer.bias.grad.count_nonzero() == 3
