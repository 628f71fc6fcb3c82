"""An exponential moving average of the weights over the steps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """The exponential moving average of all that a model learns, statistics of batch norm too.

    ``average += (1 - d) * (weights - average)`` after each step, with
    ``d = min(decay, (1 + step) / (10 + step))``, so that the weights it began with are soon
    forgotten: TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.

    Args:
        model: Whose weights; the average begins with those it has now.
        decay: What one step keeps of the average, in [0, 1).

    Attributes:
        tensors: The average, by the names of the model's state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = dict(model.state_dict())  # they share memory with the model
        self.tensors = {name: tensor.clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, the first of which is 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), share)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up an average that was kept."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
