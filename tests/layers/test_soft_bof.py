import torch
from builders import stir
from reference import soft_bof_loops

from ensemble_kit.layers.soft_bof import SoftBoF


def test_matches_the_paper_equation(rng):
    layer = stir(SoftBoF(num_features=5, num_clusters=3, momentum=0.1).double()).eval()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
    counts = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]

    ours = layer.aggregate(layer.describe(frames, torch.tensor(counts)[:, 0]), torch.tensor(counts))

    assignments = layer.assignment(frames, torch.ones(2, 4)).tolist()
    for video in range(2):
        for repeat in range(2):
            drawn = [
                row
                for row, count in zip(assignments[video], counts[video][repeat], strict=True)
                for _ in range(count)
            ]
            torch.testing.assert_close(ours[video, repeat].tolist(), soft_bof_loops(drawn))
    assert ours.shape[-1] == layer.output_size == layer.projection_fan_in == 3
