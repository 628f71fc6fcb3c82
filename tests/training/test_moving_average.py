import torch
from torch import nn

from ensemble_kit.training.moving_average import MovingAverage


def test_a_moving_average_forgets_its_start_and_then_decays(rng):
    model = nn.Linear(3, 2).double()
    weights = [torch.randn(2, 3, generator=rng, dtype=torch.float64) for _ in range(40)]
    expected = model.weight.detach().clone()
    average = MovingAverage(model, 0.75)

    for step, weight in enumerate(weights, start=1):
        model.weight.data.copy_(weight)
        average.update(step)

    for step, weight in enumerate(weights, start=1):
        decay = min(0.75, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.tensors["weight"], expected)
    torch.testing.assert_close(average.tensors["bias"], model.bias.detach())
