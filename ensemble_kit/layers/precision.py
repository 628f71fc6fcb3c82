"""What stays in float32 where autocast computes in bfloat16."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(values: Tensor) -> AbstractContextManager[None]:
    """Return a context that turns autocast off on the device of some values.

    Where autocast is off already it does nothing, so that it leaves no trace in an exported graph.
    """
    kind = values.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values in float32, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
