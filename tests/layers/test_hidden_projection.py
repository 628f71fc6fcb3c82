import torch
from reference import product_loops

from ensemble_kit.layers.hidden_projection import HiddenProjection


def test_is_linear_with_a_bias(rng):
    layer = HiddenProjection(num_features=5, size=3, fan_in=2).double()
    features = torch.randn(2, 1, 5, generator=rng, dtype=torch.float64)

    ours = layer(features)

    for row, hidden in zip(features[:, 0].tolist(), ours[:, 0], strict=True):
        products = product_loops(row, layer.weight.tolist())
        paper = [x + b for x, b in zip(products, layer.bias.tolist(), strict=True)]
        torch.testing.assert_close(hidden.tolist(), paper)


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
