from math import sqrt

import pytest
import torch
from builders import stir
from poolings import statistics_of
from reference import batch_norm_loops, gating_loops, product_loops, se_gating_loops

from ensemble_kit.layers.se_gating import SEGating


def build(num_features=48):
    torch.manual_seed(0)
    return stir(SEGating(num_features=num_features, momentum=0.1).double())


def test_matches_the_paper_equation_in_evaluation(rng):
    layer = build().eval()
    features = torch.randn(2, 3, 48, generator=rng, dtype=torch.float64)

    ours = layer(features)

    for row, gated in zip(features.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        paper = se_gating_loops(
            row, layer.squeeze.tolist(), statistics_of(layer.batch_norm), layer.excite.tolist()
        )
        torch.testing.assert_close(gated.tolist(), paper)


def test_matches_the_paper_equation_in_training(rng):
    layer = build()
    features = torch.randn(5, 1, 48, generator=rng, dtype=torch.float64)

    ours = layer(features)

    rows, norm = features[:, 0].tolist(), layer.batch_norm
    squeezed = [product_loops(row, layer.squeeze.tolist()) for row in rows]
    normed = batch_norm_loops(squeezed, norm.scale.tolist(), norm.shift.tolist())
    for row, narrow, gated in zip(rows, normed, ours[:, 0], strict=True):
        logits = product_loops([max(x, 0) for x in narrow], layer.excite.tolist())
        torch.testing.assert_close(gated.tolist(), gating_loops(row, logits))


def test_gradients_reach_every_parameter(rng):
    layer = build()
    gated = layer(torch.randn(5, 48, generator=rng, dtype=torch.float64))

    (gated * torch.randn(gated.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


@pytest.mark.parametrize(("num_features", "narrow"), [(48, 3), (47, 2), (5, 1)])
def test_the_narrow_layer_has_a_sixteenth_of_the_features_and_at_least_one(num_features, narrow):
    layer = build(num_features)

    assert layer.squeeze.shape == (num_features, narrow)
    assert layer.excite.shape == (narrow, num_features)


def test_matrices_start_with_the_scale_of_their_fan_in():
    torch.manual_seed(0)
    layer = SEGating(num_features=1600, momentum=0.2)

    assert abs(layer.squeeze.std().item() * sqrt(1600) - 1) < 0.02
    assert abs(layer.excite.std().item() * sqrt(100) - 1) < 0.02
    assert layer.batch_norm.momentum == 0.2
