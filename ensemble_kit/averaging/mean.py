"""The mean of the same tensors of several files, computed one block at a time."""

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

# Small enough that a block stays in a core's cache and that torch does not split it among its
# threads, which would wait for one another: hashing keeps the other cores busy meanwhile.
BLOCK_VALUES = 2**15


class MeanOfFiles:
    """The mean of the tensors of some files: the uniform mean, or the largest of integers.

    Floating values are summed in float64 in the files' order, so copies of one float32 tensor
    average to themselves exactly. Integers count things, and the last count is the largest. Files
    are read one block at a time, so that memory holds a few blocks however many and large they are.

    Args:
        files: At least one open file; all have the same tensors.
        statistics: The file whose batch-norm statistics are taken as they are; None averages
            statistics like everything else.
        block_values: How many values of a file are read at a time.
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        *,
        statistics: TensorFile | None = None,
        block_values: int = BLOCK_VALUES,
    ) -> None:
        self._files = files
        self._statistics = statistics
        self._block_values = block_values

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The type and shape of every tensor, as in the files."""
        return self._files[0].specs

    def tensor(self, name: str) -> Tensor:
        """Return the mean of a tensor, in the stored type.

        Raises:
            CheckpointError: One of the files, which is named, holds NaN or infinity in it.
        """
        spec = self.specs[name]
        mean = torch.empty(spec.num_values, dtype=torch_type(spec.storage_type))
        start = 0
        for block in self.blocks(name):
            mean[start : start + len(block)] = block
            start += len(block)
        return mean.reshape(spec.shape)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the mean of a tensor, flat and in order; the next block overwrites each.

        Raises:
            CheckpointError: As ``tensor``.
        """
        files = self._files
        if self._statistics is not None and name.endswith(STATISTICS):
            files = [self._statistics]
        spec = self.specs[name]
        dtype = torch_type(spec.storage_type)
        size = min(self._block_values, spec.num_values)
        values = torch.empty(size, dtype=dtype)
        total = torch.empty(size, dtype=torch.float64 if dtype.is_floating_point else dtype)
        for start in range(0, spec.num_values, self._block_values):
            count = min(self._block_values, spec.num_values - start)
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
    """Set ``values`` to the mean, or the largest, of the block that starts at byte ``start``."""
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
    # a sum is finite only if all its terms are, so one check of a block in cache is enough
    if is_mean and not bool(total.sum().isfinite()):
        _refuse_not_finite(files, name)
    values.copy_(total.div_(len(files)) if is_mean else total)


def _refuse_not_finite(files: Sequence[TensorFile], name: str) -> None:
    for file in files:
        if not is_finite(file.tensor(name)):
            raise not_finite(file.path, name)
