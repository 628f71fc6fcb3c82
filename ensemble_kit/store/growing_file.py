"""A tensor file that is written while its tensors grow row by row, in constant memory.

The first tensor's rows go to their place at once. Those of the other tensors wait in files without
names beside the output, which are gone however this process ends, and are appended at the end. Room
for the header is left at the start: the numbers in it are given the most digits they can have.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.store.provenance import TensorMetadata
from ensemble_kit.store.tensor_files import TensorSpec, header_of

MOST = 10**15  # more rows than any file has, for a header with room for every number
BLOCK_BYTES = 1 << 20


class GrowingFile:
    """A tensor file whose tensors all grow along their first axis.

    Args:
        aside: The file to write, as ``written_aside`` yields it.
        folder: Where tensors wait; the output's own, since other disks may be too small.
        specs: The type and shape of one row of each tensor, in the order of the file. Types of
            eight bytes after narrower ones may lie at places that are no multiple of eight.
        metadata: What the file will say of itself, its hashes of any value.
    """

    def __init__(
        self,
        aside: Path,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        metadata: TensorMetadata,
    ) -> None:
        self._specs = specs
        self._room = len(header_of(self._grown(dict.fromkeys(specs, MOST)), metadata))
        self._stack = ExitStack()
        self._file = self._stack.enter_context(aside.open("wb"))
        self._file.seek(self._room)
        self._waiting: dict[str, IO[bytes]] = {
            name: self._stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
            for name in list(specs)[1:]
        }
        self._sizes = dict.fromkeys(specs, 0)

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def append(self, name: str, rows: NDArray[Any] | bytes) -> None:
        """Append rows to a tensor; an array is of its type already."""
        values = rows if isinstance(rows, bytes) else np.ascontiguousarray(rows).reshape(-1)
        content = values if isinstance(values, bytes) else values.view(np.uint8).data
        self._waiting.get(name, self._file).write(content)
        self._sizes[name] += len(content)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor that waits, from its start, some at a time."""
        file = self._waiting[name]
        file.seek(0)
        while block := file.read(BLOCK_BYTES):
            yield block
        assert file.tell() == self._sizes[name]

    def finish(self, metadata: TensorMetadata) -> None:
        """Append what waits, and write the header."""
        for file in self._waiting.values():
            file.seek(0)
            shutil.copyfileobj(file, self._file, BLOCK_BYTES)
        rows = {
            name: self._sizes[name] // (spec.storage_type.num_bytes * prod(spec.shape))
            for name, spec in self._specs.items()
        }
        header = header_of(self._grown(rows), metadata, room=self._room)
        self._file.seek(0)
        self._file.write(header)

    def _grown(self, rows: Mapping[str, int]) -> list[tuple[str, TensorSpec]]:
        return [
            (name, TensorSpec(spec.dtype, (rows[name], *spec.shape)))
            for name, spec in self._specs.items()
        ]
