import copy

import pytest
import torch
from builders import stir
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import batch_norm_loops, fixed_norm_loops, l2_loops
from torch import nn

from ensemble_kit.layers.normalisation import BatchNorm, l2_normalise, l2_normalise_twice


def test_l2_normalisation_matches_the_loops(rng):
    vectors = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    vectors[1] *= 1e-8  # below the epsilon, so it is not brought to length 1

    ours = l2_normalise(vectors)

    torch.testing.assert_close(ours.tolist(), [l2_loops(vector) for vector in vectors.tolist()])
    assert ours[1].norm() < 0.1


def test_a_zero_vector_stays_zero_and_has_a_finite_gradient():
    vector = torch.zeros(4, requires_grad=True)

    l2_normalise(vector).sum().backward()

    assert l2_normalise(vector).tolist() == [0.0] * 4
    assert vector.grad.isfinite().all()


def test_normalising_twice_at_once_is_normalising_twice(rng):
    rows = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
    rows[0, 1] = 0.0
    rows[0, 2] *= 1e-8  # below the epsilon
    rows[1] = 0.0

    ours = l2_normalise_twice(rows)

    torch.testing.assert_close(ours, l2_normalise(l2_normalise(rows).flatten(1)))
    assert not ours[1].any()


def test_l2_normalisation_takes_another_dimension(rng):
    matrix = torch.randn(3, 5, generator=rng)

    torch.testing.assert_close(l2_normalise(matrix, dim=0), l2_normalise(matrix.T).T)


def test_batch_norm_matches_the_loops_in_training_and_in_evaluation(rng):
    layer = stir(BatchNorm(num_features=3).double())
    values = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    constants = layer.scale.tolist(), layer.shift.tolist()
    statistics = layer.running_mean.tolist(), layer.running_variance.tolist()
    rows = values.flatten(0, 1).tolist()

    evaluated = layer.eval()(values)
    trained = layer.train()(values)

    torch.testing.assert_close(
        evaluated.flatten(0, 1).tolist(),
        [fixed_norm_loops(row, *statistics, *constants) for row in rows],
    )
    torch.testing.assert_close(trained.flatten(0, 1).tolist(), batch_norm_loops(rows, *constants))


@pytest.mark.parametrize("is_training", [False, True])
def test_a_product_is_normalised_alike_with_the_factors_in_its_weights(is_training, rng):
    layer = stir(BatchNorm(num_features=3).double()).train(is_training)
    rows = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    row_weights = torch.tensor([[1, 2, 0, 3], [1, 1, 1, 0]])

    expected = copy.deepcopy(layer)(rows @ weight, row_weights)

    torch.testing.assert_close(layer.of_product(rows, weight, row_weights), expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=6).filter(lambda counts: sum(counts) > 1))
def test_a_row_of_weight_w_counts_as_w_rows(counts):
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64).requires_grad_()
    repeated = values.detach().flatten(0, 1).repeat_interleave(torch.tensor(counts), dim=0)
    repeated.requires_grad_()
    weights = torch.tensor(counts).reshape(2, 3)
    ours = stir(BatchNorm(num_features=4).double())
    theirs = nn.BatchNorm1d(4, eps=1e-3, momentum=0.001).double()
    theirs.load_state_dict(
        {
            "weight": ours.scale,
            "bias": ours.shift,
            "running_mean": ours.running_mean,
            "running_var": ours.running_variance,
            "num_batches_tracked": torch.tensor(0),
        }
    )

    output = ours(values, weights)
    expected = theirs(repeated)
    (output.tanh() * weights.unsqueeze(-1)).sum().backward()
    expected.tanh().sum().backward()

    torch.testing.assert_close(
        output.flatten(0, 1).repeat_interleave(torch.tensor(counts), dim=0), expected
    )
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    torch.testing.assert_close(ours.scale.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.shift.grad, theirs.bias.grad)


def test_rows_without_weights_count_once(rng):
    weighted, plain = BatchNorm(num_features=3), BatchNorm(num_features=3)
    values = torch.randn(5, 3, generator=rng)

    torch.testing.assert_close(weighted(values, torch.ones(5)), plain(values))
    torch.testing.assert_close(weighted.running_mean, plain.running_mean)
    torch.testing.assert_close(weighted.running_variance, plain.running_variance)


def test_the_papers_constants_are_the_default():
    layer = BatchNorm(num_features=2)

    assert layer.EPSILON == 1e-3
    assert layer.momentum == 0.001
    layer(torch.full((3, 2), 5.0))
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 0.005))


def test_without_momentum_the_statistics_are_the_mean_over_batches_since_the_reset(rng):
    layer = BatchNorm(num_features=3, momentum=None)
    layer(100 + torch.randn(7, 3, generator=rng))
    batches = [torch.randn(size, 3, generator=rng) for size in (4, 6, 5)]

    layer.reset_statistics()
    for batch in batches:
        layer(batch)

    means = torch.stack([batch.mean(dim=0) for batch in batches])
    variances = torch.stack([batch.var(dim=0) for batch in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(dim=0))
    torch.testing.assert_close(layer.running_variance, variances.mean(dim=0))


def test_evaluation_changes_no_statistics(rng):
    layer = BatchNorm(num_features=3).eval()

    layer(torch.randn(4, 3, generator=rng))

    assert layer.running_mean.tolist() == [0.0] * 3
    assert layer.running_variance.tolist() == [1.0] * 3


@pytest.mark.parametrize("weights", [[0, 0, 0], [0, 1, 0]])
def test_no_row_or_one_row_is_finite(weights, rng):
    layer = BatchNorm(num_features=2)

    output = layer(torch.randn(3, 2, generator=rng), torch.tensor(weights))

    assert output.isfinite().all()
    assert layer.running_mean.isfinite().all()
    assert layer.running_variance.isfinite().all()
