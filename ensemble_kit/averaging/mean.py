"""The mean of tensors that lie in several files, computed a block at a time."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ensemble_kit.networks.storage import is_finite, torch_type
from ensemble_kit.networks.weights import not_finite
from ensemble_kit.store.tensor_files import (
    STATISTICS,
    TensorFile,
    TensorSpec,
)

# What a block needs stays in a core's cache, and torch shares none this small out to its threads,
# which would wait for one another: hashing keeps the other cores busy.
BLOCK_VALUES = 2**15


class MeanOfFiles:
    """The mean of some files' tensors: floating ones the uniform mean, integer ones the largest.

    Floating values are summed in float64 in the files' order, so copies of one float32 tensor
    average to themselves exactly. Integers count things, and the last count is the largest. Files
    are read a block at a time: however many and large they are, memory is that of a few blocks.

    Args:
        files: At least one open file; all have the same tensors.
        statistics: The file whose batch-norm statistics are taken as they are; None averages
            statistics as everything else.
    """

    def __init__(
        self, files: Sequence[TensorFile], *, statistics: TensorFile | None = None
    ) -> None:
        self._files = files
        self._statistics = statistics

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The type and shape of every tensor, those of the files."""
        return self._files[0].specs

    def tensor(self, name: str) -> Tensor:
        """Return the mean of a tensor, in the stored type.

        Raises:
            CheckpointError: It holds NaN or infinity in one of the files, which is named.
        """
        spec = self.specs[name]
        mean = torch.empty(spec.num_values, dtype=torch_type(spec.storage_type))
        start = 0
        for block in self.blocks(name):
            mean[start : start + len(block)] = block
            start += len(block)
        return mean.reshape(spec.shape)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the mean of a tensor, flat and in order; each block is gone with the next.

        Raises:
            CheckpointError: As ``tensor``.
        """
        files = self._files
        if self._statistics is not None and name.endswith(STATISTICS):
            files = [self._statistics]
        spec = self.specs[name]
        dtype = torch_type(spec.storage_type)
        size = min(BLOCK_VALUES, spec.num_values)
        values = torch.empty(size, dtype=dtype)
        total = torch.empty(size, dtype=torch.float64 if dtype.is_floating_point else dtype)
        for start in range(0, spec.num_values, BLOCK_VALUES):
            count = min(BLOCK_VALUES, spec.num_values - start)
            _combine(
                files,
                name,
                start * spec.storage_type.num_bytes,
                values[:count],
                total[:count],
            )
            yield values[:count]


def _combine(
    files: Sequence[TensorFile], name: str, start: int, values: Tensor, total: Tensor
) -> None:
    """Make ``values`` the mean, or the largest, of a block that starts at byte ``start``."""
    is_mean = total.is_floating_point()
    buffer = values.view(torch.uint8).numpy()
    for number, file in enumerate(files):
        file.read_into(buffer, name, start)
        if number == 0:
            total.copy_(values)
        elif is_mean:
            total.add_(values)
        else:
            torch.maximum(total, values, out=total)
    # one look at the sum of a block, still in cache, stands for one at each value of each file
    if is_mean and not bool(total.sum().isfinite()):
        _refuse_not_finite(files, name)
    values.copy_(total.div_(len(files)) if is_mean else total)


def _refuse_not_finite(files: Sequence[TensorFile], name: str) -> None:
    for file in files:
        if not is_finite(file.tensor(name)):
            raise not_finite(file.path, name)
