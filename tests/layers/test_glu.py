from math import sqrt

import torch
from reference import glu_loops

from ensemble_kit.layers.glu import GLU


def build():
    torch.manual_seed(0)
    layer = GLU(num_features=4).double()
    layer.gate_bias.data.normal_()
    layer.value_bias.data.normal_()
    return layer


def test_matches_the_paper_equation(rng):
    layer = build()
    features = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)

    ours = layer(features)

    gate = layer.gate.tolist(), layer.gate_bias.tolist()
    value = layer.value.tolist(), layer.value_bias.tolist()
    for row, gated in zip(features.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        torch.testing.assert_close(gated.tolist(), glu_loops(row, gate, value))


def test_gradients_reach_every_parameter(rng):
    layer = build()

    layer(torch.randn(5, 4, generator=rng, dtype=torch.float64)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_matrices_start_with_the_scale_of_their_fan_in_and_biases_at_zero():
    torch.manual_seed(0)
    layer = GLU(num_features=400)

    for matrix in (layer.gate, layer.value):
        assert abs(matrix.std().item() * sqrt(400) - 1) < 0.02
    assert layer.gate_bias.count_nonzero() == layer.value_bias.count_nonzero() == 0
