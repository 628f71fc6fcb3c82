"""Differentiable sums over the processes that train one model together."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


def sum_over_processes(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of the values of all processes, in each process.

    The gradient with respect to a process's values is the sum of the gradients of all processes,
    because the sum enters the loss of each of them.

    Args:
        values: Floating point, of the same shape in each process.
        group: The processes; None where this is the only one.
    """
    if group is None:
        return values
    summed: Tensor = _SumOverProcesses.apply(values, group)  # type: ignore[no-untyped-call]
    return summed


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        context.group = group
        return _summed(values, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, context.group), None


def _summed(values: Tensor, group: ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total
