from math import log

import torch
from reference import cross_entropy_loops

from ensemble_kit.training.loss import cross_entropy


def test_cross_entropy_matches_the_loops_where_probabilities_are_zero_or_one_too(rng):
    probabilities = torch.rand(3, 5, generator=rng, dtype=torch.float64)
    probabilities[0, :2] = torch.tensor([0.0, 1.0])
    labels = (torch.rand(3, 5, generator=rng) < 0.5).double()
    labels[0, :2] = torch.tensor([1.0, 0.0])

    ours = cross_entropy(probabilities, labels)

    torch.testing.assert_close(
        ours.item(), cross_entropy_loops(probabilities.tolist(), labels.tolist())
    )


def test_cross_entropy_sums_over_classes_and_averages_over_videos():
    loss = cross_entropy(torch.full((3, 7), 0.5), torch.ones(3, 7))

    torch.testing.assert_close(loss.item(), 7 * log(2), rtol=1e-4, atol=0)  # epsilon is 1e-5
