import torch
from reference import average_loops

from ensemble_kit.layers.average_pooling import AveragePooling


def test_matches_the_loops_for_repeated_frames(rng):
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
    counts = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]
    layer = AveragePooling(num_features=5)

    ours = layer.aggregate(layer.describe(frames, torch.tensor(counts)[:, 0]), torch.tensor(counts))

    for video in range(2):
        for repeat in range(2):
            drawn = [
                frame
                for frame, count in zip(frames[video].tolist(), counts[video][repeat], strict=True)
                for _ in range(count)
            ]
            torch.testing.assert_close(ours[video, repeat].tolist(), average_loops(drawn))


def test_has_no_parameters_and_keeps_the_width():
    layer = AveragePooling(num_features=5)

    assert list(layer.parameters()) == []
    assert layer.output_size == 5
