from math import sqrt

import torch
from poolings import build, pool, repeated, statistics_of
from reference import gated_bof_loops

from ensemble_kit.layers.gated_bof import GatedBoF

COUNTS = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]


def test_matches_the_loops(rng):
    layer = build("gated_bof").eval()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = pool(layer, frames, torch.tensor(COUNTS))

    assignments = layer.assignment(frames, torch.ones(2, 4)).tolist()
    for video in range(2):
        for repeat in range(2):
            paper = gated_bof_loops(
                repeated(assignments[video], COUNTS[video][repeat]),
                layer.gate_in.tolist(),
                layer.gate_out.tolist(),
                statistics_of(layer.batch_norm),
            )
            torch.testing.assert_close(ours[video, repeat].tolist(), paper)
    assert ours.shape[-1] == layer.output_size == layer.projection_fan_in == 3


def test_gates_start_with_the_scale_of_their_rank():
    torch.manual_seed(0)
    layer = GatedBoF(num_features=3, num_clusters=500, gate_rank=100, momentum=0.2)

    assert layer.gate_in.shape == (500, 100)
    assert layer.gate_out.shape == (100, 500)
    for gate in (layer.gate_in, layer.gate_out):
        assert abs(gate.std().item() * sqrt(100) - 1) < 0.02
    assert layer.batch_norm.momentum == layer.assignment.batch_norm.momentum == 0.2
