"""What stays in float32 where autocast computes in bfloat16."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(values: Tensor) -> AbstractContextManager[None]:
    """Return a block in which nothing is rounded to bfloat16 on the device of some values.

    Where autocast is off there is nothing to turn off, and nothing that an exported graph would
    have to say about it.
    """
    kind = values.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32 if they are in half of it, else as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
