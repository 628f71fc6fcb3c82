import torch
from poolings import repeated
from reference import largest_loops

from ensemble_kit.layers.max_pooling import max_over_drawn

COUNTS = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]


def test_matches_the_loops_over_drawn_frames(rng):
    values = torch.rand(2, 4, 3, generator=rng, dtype=torch.float64)

    ours = max_over_drawn(values, torch.tensor(COUNTS))

    for video in range(2):
        for repeat in range(2):
            paper = largest_loops(repeated(values[video].tolist(), COUNTS[video][repeat]))
            assert ours[video, repeat].tolist() == paper


def test_a_repeat_that_drew_nothing_is_zeros(rng):
    values = torch.rand(2, 4, 3, generator=rng) + 1

    ours = max_over_drawn(values, torch.tensor([[[0, 0, 0, 0]], [[0, 1, 0, 0]]]))

    assert ours[0].count_nonzero() == 0
    assert torch.equal(ours[1, 0], values[1, 1])


def test_the_gradient_goes_to_the_largest_drawn_frame_however_often_it_was_drawn():
    values = torch.tensor([[[1.0], [5.0], [3.0]]], requires_grad=True)

    max_over_drawn(values, torch.tensor([[[1, 0, 4]]])).sum().backward()

    assert values.grad.flatten().tolist() == [0.0, 0.0, 1.0]
