"""The processes that torchrun starts to train one run together, connected by gloo or NCCL."""

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

from ensemble_kit.choices import DEVICE
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import WhitenedResiduals

# The others wait while the first process averages and predicts; torchrun ends all if one dies.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them.

    Attributes:
        rank: This process's number, counted from 0; the first one writes all files.
        count: How many processes there are.
        device: ``cpu`` or ``cuda``, where tensors have to be to be sent.
    """

    rank: int = 0
    count: int = 1
    device: str = DEVICE

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    @property
    def group(self) -> ProcessGroup | None:
        """The group of all processes; None if this is the only one."""
        return distributed.group.WORLD if self.count > 1 else None

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all processes, which have one shape, stacked by rank."""
        if self.count == 1:
            return values.unsqueeze(0)
        own = values.to(self.device)
        every = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(every, own)
        return torch.stack(every).cpu()

    def gather_number(self, number: float) -> list[float]:
        """Return the numbers of all processes, by rank."""
        return self.gather(torch.tensor(number, dtype=torch.float64)).tolist()

    def tell(self, value: Any) -> Any:
        """Return the first process's value, which JSON can hold, in every process."""
        if self.count == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = int(self.gather_number(len(text))[0])
        told = text.to(self.device) if self.is_first else self._empty((size,), torch.uint8)
        distributed.broadcast(told, 0)
        return json.loads(bytes(told.tolist()))

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's tensors in every process, on the CPU."""
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
        """Compute a model's batch statistics over the videos of all processes together."""
        for part in model.modules():
            if isinstance(part, (BatchNorm, WhitenedResiduals)):
                part.group = self.group

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def join(device: str) -> Processes:
    """Return this process among those that torchrun has started, once all are connected.

    Args:
        device: ``cpu`` connects them by gloo; ``cuda`` by NCCL, each process on its own GPU.
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
    """Return how many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
