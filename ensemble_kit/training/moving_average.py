"""An exponential moving average of the weights over the steps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """The exponential moving average of a model's weights and batch-norm statistics.

    After each step ``average += (1 - d) * (weights - average)``, with
    ``d = min(decay, (1 + step) / (10 + step))``, so that the initial weights are soon forgotten.
    This is TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.

    Args:
        model: The model; the average begins with its present weights.
        decay: The share of the average that one step keeps, in [0, 1).

    Attributes:
        tensors: The average, by the names of the model's state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = dict(model.state_dict())  # shares memory with the model, so it follows it
        self.tensors = {name: tensor.clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step to the average; the first step is 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), share)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from a saved average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
