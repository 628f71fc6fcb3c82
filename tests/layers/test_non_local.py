from math import sqrt

import pytest
import torch
from reference import non_local_loops

from ensemble_kit.layers.non_local import NonLocal


def build(temperature=0.5):
    torch.manual_seed(0)
    return NonLocal(num_features=5, inner_size=4, temperature=temperature).double()


@pytest.mark.parametrize("temperature", [0.5, 1 / 64])
def test_matches_the_paper_equations(temperature, rng):
    layer = build(temperature)
    residuals = 3 * torch.randn(2, 2, 3, 5, generator=rng, dtype=torch.float64)

    ours = layer(residuals)

    matrices = [m.tolist() for m in (layer.theta, layer.phi, layer.g, layer.output)]
    for rows, mixed in zip(residuals.flatten(0, 1), ours.flatten(0, 1), strict=True):
        paper = non_local_loops(rows.tolist(), *matrices, temperature)
        torch.testing.assert_close(mixed.tolist(), paper)


def test_with_a_zero_output_matrix_nothing_changes(rng):
    layer = build()
    layer.output.data.zero_()
    residuals = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)

    assert torch.equal(layer(residuals), residuals)


def test_permuting_the_clusters_permutes_the_output(rng):
    layer = build()
    residuals = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)

    permuted = layer(residuals[:, [2, 0, 1]])

    torch.testing.assert_close(permuted, layer(residuals)[:, [2, 0, 1]])


def test_gradients_reach_every_parameter(rng):
    layer = build()
    mixed = layer(torch.randn(2, 3, 5, generator=rng, dtype=torch.float64))

    (mixed * torch.randn(mixed.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_matrices_start_with_the_scale_of_their_fan_in():
    torch.manual_seed(0)
    layer = NonLocal(num_features=400, inner_size=100, temperature=1.0)

    for matrix in (layer.theta, layer.phi, layer.g):
        assert abs(matrix.std().item() * sqrt(400) - 1) < 0.02
    assert abs(layer.output.std().item() * sqrt(100) - 1) < 0.02
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 400 * 100
