from math import sqrt

import pytest
import torch
from poolings import build, pool, repeated
from reference import net_fv_loops

from ensemble_kit.layers.net_fv import NetFV

COUNTS = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]


def test_matches_the_paper_equations(rng):
    layer = build("net_fv").eval()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = pool(layer, frames, torch.tensor(COUNTS))

    assignments = layer.assignment(frames, torch.ones(2, 4)).tolist()
    for video in range(2):
        for repeat in range(2):
            paper = net_fv_loops(
                repeated(frames[video].tolist(), COUNTS[video][repeat]),
                repeated(assignments[video], COUNTS[video][repeat]),
                layer.centres.tolist(),
                layer.covariances.tolist(),
            )
            torch.testing.assert_close(ours[video, repeat].tolist(), paper)
    assert ours.shape[-1] == layer.output_size == 30


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_each_order_has_length_one(scale, rng):
    layer = build("net_fv").eval()
    frames = scale * torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    orders = pool(layer, frames, torch.tensor(COUNTS)).unflatten(-1, (2, 15))

    torch.testing.assert_close(orders.norm(dim=-1), torch.ones(2, 2, 2, dtype=torch.float64))


def test_a_covariance_at_zero_is_finite(rng):
    layer = build("net_fv").eval()
    layer.covariances.data.zero_()

    pooled = pool(
        layer, torch.randn(2, 4, 5, generator=rng, dtype=torch.float64), torch.tensor(COUNTS)
    )

    assert pooled.isfinite().all()


def test_centres_and_covariances_start_with_the_scale_of_the_features():
    torch.manual_seed(0)
    layer = NetFV(num_features=400, num_clusters=300, momentum=0.1)

    assert abs(layer.centres.std().item() * sqrt(400) - 1) < 0.02
    assert abs(layer.covariances.std().item() * sqrt(400) - 1) < 0.02
    assert abs(layer.covariances.mean().item() - 1) < 0.01
    assert not torch.allclose(layer.centres, layer.assignment.weight.T)
    assert layer.projection_fan_in == 300
