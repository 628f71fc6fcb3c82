from math import sqrt

import torch
from builders import stir
from reference import batch_norm_loops, fixed_norm_loops, product_loops, softmax_loops

from ensemble_kit.layers.soft_assignment import SoftAssignment


def constants_of(layer):
    norm = layer.batch_norm
    return norm.scale.tolist(), norm.shift.tolist()


def test_matches_the_loops_in_training_where_weights_repeat_frames(rng):
    layer = stir(SoftAssignment(num_features=5, num_clusters=3, momentum=0.1).double())
    frames = torch.randn(1, 4, 5, generator=rng, dtype=torch.float64)
    counts = [2, 1, 0, 3]

    ours = layer(frames, torch.tensor([counts]))

    weight, rows = layer.weight.tolist(), frames[0].tolist()
    drawn = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    logits = batch_norm_loops([product_loops(row, weight) for row in drawn], *constants_of(layer))
    repeated = ours[0].repeat_interleave(torch.tensor(counts), dim=0)
    torch.testing.assert_close(repeated.tolist(), [softmax_loops(row) for row in logits])


def test_matches_the_loops_in_evaluation(rng):
    layer = stir(SoftAssignment(num_features=5, num_clusters=3, momentum=0.1).double()).eval()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = layer(frames, torch.ones(2, 4))

    norm = layer.batch_norm
    statistics = norm.running_mean.tolist(), norm.running_variance.tolist()
    paper = [
        softmax_loops(
            fixed_norm_loops(
                product_loops(frame, layer.weight.tolist()), *statistics, *constants_of(layer)
            )
        )
        for frame in frames.flatten(0, 1).tolist()
    ]
    torch.testing.assert_close(ours.flatten(0, 1).tolist(), paper)


def test_weights_start_with_the_scale_of_their_fan_in():
    torch.manual_seed(0)
    layer = SoftAssignment(num_features=400, num_clusters=300, momentum=0.1)

    assert abs(layer.weight.std().item() * sqrt(400) - 1) < 0.02
    assert layer.batch_norm.momentum == 0.1
