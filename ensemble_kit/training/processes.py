"""The processes that train one run together: what torchrun starts, talking by gloo or NCCL."""

import atexit
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import WhitenedResiduals

# The first process averages and predicts while the others wait; torchrun ends all when one dies.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """Which of the processes this is.

    Attributes:
        rank: Counted from 0; the first one writes all files.
        count: How many there are.
        device: ``cpu`` or ``cuda``: where what they tell each other has to be.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def group(self) -> ProcessGroup | None:
        """The group of all processes; None where this is the only one."""
        return distributed.group.WORLD if self.count > 1 else None

    def gather(self, values: Tensor) -> Tensor:
        """Return every process's values, of one shape, stacked by rank."""
        if self.count == 1:
            return values.unsqueeze(0)
        own = values.to(self.device)
        every = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(every, own)
        return torch.stack(every).cpu()

    def gather_number(self, number: float) -> list[float]:
        """Return every process's number, by rank."""
        return self.gather(torch.tensor(number, dtype=torch.float64)).tolist()

    def tell(self, value: Any) -> Any:
        """Return the first process's value, of what JSON can hold, in all of them."""
        if self.count == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = int(self.gather_number(len(text))[0])
        told = text.to(self.device) if self.is_first else self._empty((size,), torch.uint8)
        distributed.broadcast(told, 0)
        return json.loads(bytes(told.tolist()))

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's tensors in all of them, on the CPU."""
        if self.count == 1:
            return dict(tensors)
        specs = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        shared = {}
        for name, (dtype, shape) in self.tell(specs).items():
            told = self._empty(shape, getattr(torch, dtype))
            if self.is_first:
                told.copy_(tensors[name])
            distributed.broadcast(told, 0)
            shared[name] = told.cpu()
        return shared

    def synchronise(self, model: nn.Module) -> None:
        """Let a model's batch statistics be those of all processes' videos together."""
        for part in model.modules():
            if isinstance(part, (BatchNorm, WhitenedResiduals)):
                part.group = self.group

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def join(device: str) -> Processes:
    """Return what torchrun has made of this process, once it has met the others.

    Args:
        device: ``cpu`` talks by gloo; ``cuda`` by NCCL, each process on a GPU of its own.
    """
    count = num_processes()
    if count == 1:
        return Processes()
    if not distributed.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(distributed.destroy_process_group)
    return Processes(distributed.get_rank(), count, device)


def num_processes() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
