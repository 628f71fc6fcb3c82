from math import sqrt

import pytest
import torch
from reference import moe_loops, product_loops, sigmoid

from ensemble_kit.layers.heads import Logistic, MixtureOfExperts


def build(head, **arguments):
    torch.manual_seed(0)
    layer = head(num_features=5, num_classes=3, **arguments).double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


def test_logistic_matches_the_loops(rng):
    layer = build(Logistic)
    features = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = layer(features)

    weight, bias = layer.classes.weight.T.tolist(), layer.classes.bias.tolist()
    for row, probabilities in zip(features.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        logits = zip(product_loops(row, weight), bias, strict=True)
        torch.testing.assert_close(probabilities.tolist(), [sigmoid(x + b) for x, b in logits])


@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_mixture_of_experts_matches_the_loops(num_experts, rng):
    layer = build(MixtureOfExperts, num_experts=num_experts)
    features = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = layer(features)

    gates, experts = layer.gates.weight.T.tolist(), layer.experts.weight.T.tolist()
    for row, probabilities in zip(features.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        paper = moe_loops(row, gates, experts, layer.experts.bias.tolist(), num_experts)
        torch.testing.assert_close(probabilities.tolist(), paper)


def test_gates_of_low_rank_match_the_loops(rng):
    layer = build(MixtureOfExperts, num_experts=2, gate_rank=4)
    features = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = layer(features)

    reduction, narrow = layer.reduction.weight.T.tolist(), layer.gates.weight.T.tolist()
    gates = [product_loops(row, narrow) for row in reduction]  # x (Wr Wg) is (x Wr) Wg
    experts, bias = layer.experts.weight.T.tolist(), layer.experts.bias.tolist()
    for row, probabilities in zip(features.flatten(0, 1).tolist(), ours.flatten(0, 1), strict=True):
        paper = moe_loops(row, gates, experts, bias, 2)
        torch.testing.assert_close(probabilities.tolist(), paper)
    assert layer.gates.weight.shape == (9, 4)


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_with_zero_weights_the_dummy_expert_takes_its_share(num_experts, rng):
    layer = build(MixtureOfExperts, num_experts=num_experts)
    for parameter in layer.parameters():
        parameter.data.zero_()

    probabilities = layer(torch.randn(2, 5, generator=rng, dtype=torch.float64))

    expected = 0.5 * num_experts / (num_experts + 1)
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, expected))


def test_the_last_gate_can_turn_a_class_off():
    layer = build(MixtureOfExperts, num_experts=2)
    layer.experts.bias.data.fill_(100.0)
    layer.gates.weight.data.zero_()
    layer.gates.weight.data[5] = 100.0  # class 1's dummy: rows 3, 4 and 5 are its gates

    probabilities = layer(torch.ones(1, 5, dtype=torch.float64))[0]

    torch.testing.assert_close(
        probabilities, torch.tensor([2 / 3, 0, 2 / 3], dtype=torch.float64), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(
    ("head", "arguments"),
    [
        (Logistic, {}),
        (MixtureOfExperts, {"num_experts": 2}),
        (MixtureOfExperts, {"num_experts": 2, "gate_rank": 4}),
    ],
)
def test_gradients_reach_every_parameter(head, arguments, rng):
    layer = build(head, **arguments)

    layer(torch.randn(4, 5, generator=rng, dtype=torch.float64)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_the_penalty_is_on_kernels_and_never_on_biases():
    logistic = build(Logistic)
    mixture = build(MixtureOfExperts, num_experts=2)
    low_rank = build(MixtureOfExperts, num_experts=2, gate_rank=4)

    assert [id(kernel) for kernel in logistic.regularised()] == [id(logistic.classes.weight)]
    assert {id(kernel) for kernel in mixture.regularised()} == {
        id(mixture.gates.weight),
        id(mixture.experts.weight),
    }
    assert {id(kernel) for kernel in low_rank.regularised()} == {
        id(low_rank.reduction.weight),
        id(low_rank.gates.weight),
        id(low_rank.experts.weight),
    }


def test_kernels_start_glorot_uniform_and_biases_at_zero():
    torch.manual_seed(0)
    logistic = Logistic(num_features=300, num_classes=100)
    mixture = MixtureOfExperts(num_features=300, num_classes=100, num_experts=2)
    low_rank = MixtureOfExperts(num_features=300, num_classes=100, num_experts=2, gate_rank=200)

    for kernel, outputs in [
        (logistic.classes.weight, 100),
        (mixture.gates.weight, 300),
        (mixture.experts.weight, 200),
        (low_rank.reduction.weight, 200),
    ]:
        limit = sqrt(6 / (300 + outputs))
        assert 0.99 * limit < kernel.abs().max() <= limit
        assert abs(kernel.std() * sqrt(3) / limit - 1) < 0.02
    assert logistic.classes.bias.count_nonzero() == 0
    assert mixture.experts.bias.count_nonzero() == 0
    assert mixture.gates.bias is None
