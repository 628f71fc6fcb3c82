from math import sqrt

import torch
from builders import stir
from poolings import statistics_of
from reference import batch_norm_loops, fixed_norm_loops, gating_loops, product_loops

from ensemble_kit.layers.context_gating import ContextGating


def build(**arguments):
    torch.manual_seed(0)
    return stir(ContextGating(num_features=4, momentum=0.1, **arguments).double())


def test_matches_the_paper_equation_in_training(rng):
    layer = build()
    features = torch.randn(5, 1, 4, generator=rng, dtype=torch.float64)

    ours = layer(features)

    rows, norm = features[:, 0].tolist(), layer.batch_norm
    products = [product_loops(row, layer.weight.tolist()) for row in rows]
    logits = batch_norm_loops(products, norm.scale.tolist(), norm.shift.tolist())
    paper = [gating_loops(row, gates) for row, gates in zip(rows, logits, strict=True)]
    torch.testing.assert_close(ours[:, 0].tolist(), paper)


def test_matches_the_paper_equation_in_evaluation(rng):
    layer = build().eval()
    features = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)

    ours = layer(features)

    norm = layer.batch_norm
    constants = [
        part.tolist() for part in (norm.running_mean, norm.running_variance, norm.scale, norm.shift)
    ]
    for row, gated in zip(features.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        logits = fixed_norm_loops(product_loops(row, layer.weight.tolist()), *constants)
        torch.testing.assert_close(gated.tolist(), gating_loops(row, logits))


def test_without_its_diagonal_it_matches_the_paper_equation(rng):
    layer = build(remove_diagonal=True).eval()
    features = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)

    ours = layer(features)

    weight = layer.weight.tolist()
    for i in range(4):
        weight[i][i] = 0.0
    for row, gated in zip(features.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        logits = fixed_norm_loops(product_loops(row, weight), *statistics_of(layer.batch_norm))
        torch.testing.assert_close(gated.tolist(), gating_loops(row, logits))


def test_without_its_diagonal_no_gate_sees_its_own_feature(rng):
    features = torch.randn(4, dtype=torch.float64, generator=rng)

    def gates(features, **arguments):
        return build(**arguments).eval()(features) / features

    own = torch.autograd.functional.jacobian(lambda x: gates(x, remove_diagonal=True), features)
    full = torch.autograd.functional.jacobian(gates, features)

    torch.testing.assert_close(own.diagonal(), torch.zeros(4, dtype=torch.float64))
    assert (own.fill_diagonal_(1).abs() > 1e-4).all()
    assert (full.abs() > 1e-4).all()


def test_gates_only_turn_features_down(rng):
    features = torch.randn(5, 4, generator=rng, dtype=torch.float64)

    shares = build()(features) / features

    assert (shares > 0).all()
    assert (shares < 1).all()


def test_gradients_reach_every_parameter(rng):
    layer = build()
    gated = layer(torch.randn(5, 4, generator=rng, dtype=torch.float64))

    (gated * torch.randn(gated.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_weights_start_with_the_scale_of_their_fan_in():
    torch.manual_seed(0)
    layer = ContextGating(num_features=400, momentum=0.2)

    assert abs(layer.weight.std().item() * sqrt(400) - 1) < 0.02
    assert layer.batch_norm.momentum == 0.2
