from math import sqrt

import pytest
import torch
from builders import stir
from poolings import pool, repeated, statistics_of
from reference import average_loops, dbof_loops, largest_loops

from ensemble_kit.layers.dbof import DBoF

COUNTS = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]


def build(activation, over_frames):
    torch.manual_seed(0)
    layer = DBoF(
        num_features=5,
        num_clusters=3,
        activation=activation,
        over_frames=over_frames,
        momentum=0.1,
    )
    return stir(layer.double())


@pytest.mark.parametrize("activation", ["relu", "relu6", "sigmoid"])
@pytest.mark.parametrize("over_frames", ["max", "average"])
def test_matches_the_paper_equation(activation, over_frames, rng):
    layer = build(activation, over_frames).eval()
    frames = 4 * torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = pool(layer, frames, torch.tensor(COUNTS))

    units = dbof_loops(
        frames.flatten(0, 1).tolist(),
        layer.weight.tolist(),
        statistics_of(layer.batch_norm),
        activation,
    )
    over = largest_loops if over_frames == "max" else average_loops
    for video in range(2):
        for repeat in range(2):
            drawn = repeated(units[4 * video : 4 * video + 4], COUNTS[video][repeat])
            torch.testing.assert_close(ours[video, repeat].tolist(), over(drawn))
    assert ours.shape[-1] == layer.output_size == layer.projection_fan_in == 3
    if activation != "sigmoid":  # or the loops have not seen both ends
        flat = [x for row in units for x in row]
        assert 0 in flat
        assert (max(flat) > 6) == (activation == "relu")


def test_weights_start_with_the_scale_of_their_fan_in():
    torch.manual_seed(0)
    layer = DBoF(
        num_features=400, num_clusters=300, activation="relu", over_frames="max", momentum=0.2
    )

    assert abs(layer.weight.std().item() * sqrt(400) - 1) < 0.02
    assert layer.batch_norm.momentum == 0.2
