from math import sqrt

import pytest
import torch
from builders import stir
from poolings import pool, repeated, statistics_of
from reference import nextvlad_loops

from ensemble_kit.layers.nextvlad import NeXtVLAD

COUNTS = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]


def linear(layer):
    return layer.weight.T.tolist(), layer.bias.tolist()


@pytest.mark.parametrize(("expansion", "num_groups"), [(2, 4), (3, 2), (1, 1)])
def test_matches_the_paper_equations(expansion, num_groups, rng):
    torch.manual_seed(0)
    layer = NeXtVLAD(
        num_features=6, num_clusters=5, expansion=expansion, num_groups=num_groups, momentum=0.1
    )
    layer = stir(layer.double()).eval()
    for part in (layer.expand, layer.attention):
        part.bias.data.normal_()
    frames = torch.randn(2, 4, 6, generator=rng, dtype=torch.float64)

    ours = pool(layer, frames, torch.tensor(COUNTS))

    for video in range(2):
        for repeat in range(2):
            paper = nextvlad_loops(
                repeated(frames[video].tolist(), COUNTS[video][repeat]),
                linear(layer.expand),
                linear(layer.attention),
                (layer.assignment.tolist(), statistics_of(layer.assignment_norm)),
                layer.centres.tolist(),
                statistics_of(layer.output_norm),
            )
            torch.testing.assert_close(ours[video, repeat].tolist(), paper)
    assert ours.shape[-1] == layer.output_size == 5 * 6 * expansion // num_groups


def test_matrices_start_with_the_scales_of_the_code():
    torch.manual_seed(0)
    layer = NeXtVLAD(num_features=100, num_clusters=60, expansion=2, num_groups=4, momentum=0.2)

    assert abs(layer.assignment.std().item() * sqrt(200) - 1) < 0.02
    assert abs(layer.centres.std().item() * sqrt(50) - 1) < 0.03
    for part, limit in ((layer.expand, sqrt(6 / 300)), (layer.attention, sqrt(6 / 204))):
        assert 0.98 * limit < part.weight.abs().max() <= limit
        assert part.bias.count_nonzero() == 0
    assert layer.assignment_norm.momentum == layer.output_norm.momentum == 0.2
    assert layer.projection_fan_in == layer.output_size == 60 * 50
