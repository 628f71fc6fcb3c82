"""Tensors on disk, with their provenance: the one module that reads and writes them.

A tensor file is a safetensors file whose metadata has one key, ``ensemble_kit``, with JSON: one of
the classes of ``provenance``, named by its ``kind``. It is checked once, when the file is
opened, and is then an attribute of the open file. Torch is imported only by the functions that
return its tensors, so that selection and the listing of runs do without it. Nothing is ever
unpickled.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from ensemble_kit.errors import CheckpointError, shown
from ensemble_kit.files import written_aside
from ensemble_kit.store.dtypes import BY_NUMPY, BY_SAFETENSORS, StorageType
from ensemble_kit.store.provenance import METADATA_TYPES, NO_HASH, TensorMetadata
from ensemble_kit.store.row_files import RowFile
from ensemble_kit.validation import complaints

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    import torch
    from numpy.typing import NDArray

    Array: TypeAlias = np.ndarray[Any, Any] | torch.Tensor

METADATA_KEY = "ensemble_kit"
MAKE_AGAIN = "Make the file again with this version of ensemble-kit."
STATISTICS = ("running_mean", "running_variance")  # how names of batch norm's end; no parameters
HASHED_AT_ONCE = 2**20  # bytes
M = TypeVar("M", bound=TensorMetadata)


class TensorSpec(NamedTuple):
    """A tensor's type, in safetensors' words (``F32``, ``BF16``, ``I64``, …), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def storage_type(self) -> StorageType:
        """The type of its numbers, with all of its names."""
        return BY_SAFETENSORS[self.dtype]

    @property
    def num_values(self) -> int:
        """How many numbers the tensor holds."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The bytes that the tensor takes."""
        return self.num_values * self.storage_type.num_bytes


@dataclass(frozen=True)
class TensorFile:
    """An open tensor file. Tensors are read one at a time, from a mapping of the file.

    Attributes:
        path: Where it lies.
        specs: The type and shape of every tensor, by name, sorted.
        metadata: What the file says of itself, checked when it was opened.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    metadata: TensorMetadata
    _handle: Any
    _stream: BufferedReader
    _offsets: Mapping[str, int]
    _opened: os.stat_result

    @property
    def kind(self) -> str:
        """What kind of file it is, such as ``checkpoint`` or ``predictions``."""
        return self.metadata.kind

    def metadata_as(self, metadata_type: type[M]) -> M:
        """Return the metadata where it is of one type.

        Raises:
            CheckpointError: The file is of another kind.
        """
        if not isinstance(self.metadata, metadata_type):
            expected = metadata_type.model_fields["kind"].default
            raise CheckpointError(
                f"{self.path} is a {self.kind} file, not a {expected} file.",
                hint=f"Name a {expected} file instead.",
            )
        return self.metadata

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of a tensor as an array. Not for ``BF16``."""
        return np.asarray(self._handle.get_tensor(name))

    def rows(self, name: str) -> RowFile:
        """Return where a matrix lies, to read rows of it after this file is closed."""
        dtype = self.specs[name].storage_type.numpy
        num_rows, num_columns = self.specs[name].shape
        return RowFile(self.path, self._offsets[name], dtype, (num_rows, num_columns))

    def sha256(self) -> str:
        """Return the SHA-256 of what was opened, whatever its name stands for by now."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        """Yield the bytes of what was opened; the first block holds the whole header."""
        start = min(self._offsets.values(), default=0)
        size, position = max(start, HASHED_AT_ONCE), 0
        if hasattr(os, "pread"):
            while block := os.pread(self._stream.fileno(), size, position):
                yield block
                position += len(block)
        else:  # Windows, where an open file cannot be replaced
            with self.path.open("rb") as file:
                while block := file.read(size):
                    yield block

    def is_whole(self, content_sha256: str) -> bool:
        """Return whether the file has the bytes that were written, by the hash that it names.

        Args:
            content_sha256: See ``FusedMetadata``.
        """
        digest, named = hashlib.sha256(), content_sha256.encode()
        for number, block in enumerate(self._blocks()):
            digest.update(block if number else block.replace(named, NO_HASH.encode(), 1))
        return digest.hexdigest() == content_sha256

    def refuse_changed(self, content_sha256: str) -> None:
        """Raise unless a fused file has the bytes that were written; see ``is_whole``.

        Raises:
            CheckpointError: It has others: what it computes is not what was fused.
        """
        if not self.is_whole(content_sha256):
            raise CheckpointError(
                f"{self.path} has changed since it was fused: the SHA-256 of its content is not "
                "the one it names.",
                hint="Fuse again, or copy the file again from where it is whole.",
            )

    def tensor(self, name: str) -> "torch.Tensor":
        """Return a tensor as a CPU torch tensor of the stored type.

        Raises:
            CheckpointError: The file has been replaced since it was opened.
        """
        with self._for_torch() as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def read_into(self, target: "NDArray[np.uint8]", name: str, start: int) -> None:
        """Fill a buffer with a tensor's bytes, from its ``start``-th byte on.

        A copy: unlike a mapping, what was read leaves nothing in the memory of the process.

        Raises:
            CheckpointError: The file has become shorter since it was opened.
        """
        self._stream.seek(self._offsets[name] + start)
        if self._stream.readinto(target.data) != target.nbytes:
            raise CheckpointError(
                f"{self.path} became shorter while it was read.",
                hint="Make the file again, or copy it again from where it is whole.",
            )

    def tensors(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield every name and tensor; only the one in hand is in memory.

        Raises:
            CheckpointError: The file has been replaced since it was opened.
        """
        with self._for_torch() as file:
            for name in self.specs:
                yield name, file.get_tensor(name)

    @contextmanager
    def _for_torch(self) -> Iterator[Any]:
        with safe_open(self.path, framework="pt") as file:
            _refuse_another(self.path, self._opened)
            yield file


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a tensor file of the kit.

    Raises:
        CheckpointError: The file is missing, is not a whole safetensors file, or was not written
            by ensemble-kit.
    """
    if not isfile(path):
        raise CheckpointError(f"{path} does not exist.", hint="Name a file that exists.")
    try:
        with _opened(path) as stream, safe_open(path, framework="np") as handle:
            opened = os.fstat(stream.fileno())
            _refuse_another(path, opened)
            slices = {name: handle.get_slice(name) for name in sorted(handle.keys())}
            specs = {
                name: TensorSpec(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
            _refuse_types(path, specs)
            metadata = _metadata(path, handle.metadata())
            yield TensorFile(path, specs, metadata, handle, stream, _offsets(stream), opened)
    except SafetensorError as error:
        if not _begins_as_tensors(path):  # there safetensors would speak of a header's length
            raise CheckpointError(
                f"{path} is not a safetensors file.",
                hint="Name a checkpoint or another .safetensors file that ensemble-kit wrote.",
            ) from error
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}.",
            hint="Make the file again, or copy it again from where it is whole.",
        ) from error


def _refuse_another(path: Path, opened: os.stat_result) -> None:
    """Raise ``CheckpointError`` if a name, by which a library opens a file, is another file's."""
    try:
        is_same = os.path.samestat(path.stat(), opened)
    except OSError:
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"{path} was replaced while it was read.",
            hint="Give the command again when nothing writes that file.",
        )


def _begins_as_tensors(path: Path) -> bool:
    """Return whether the JSON of a header begins where it should, or the file ends before that."""
    with path.open("rb") as file:
        return file.read(9)[8:] in (b"{", b"")


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error


def _refuse_types(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    for name, spec in specs.items():
        if spec.dtype not in BY_SAFETENSORS:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} holds {spec.dtype}, which no file of the kit does.",
                hint="Name a file that ensemble-kit wrote.",
            )


def _offsets(stream: BufferedReader) -> dict[str, int]:
    """Return where in the file each tensor begins; safetensors has checked the header."""
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(size))
    return {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


class _Kind(BaseModel):
    kind: str


def _metadata(path: Path, texts: Mapping[str, str] | None) -> TensorMetadata:
    text = (texts or {}).get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path} has no metadata of ensemble-kit.",
            hint="Name a file that ensemble-kit wrote.",
        )
    metadata_type: type[TensorMetadata] | type[_Kind] = _Kind
    try:
        kind = _Kind.model_validate_json(text).kind
        if kind not in METADATA_TYPES:
            raise CheckpointError(
                f"{path} is a file of the kind {kind!r}, which this version of ensemble-kit does "
                "not know.",
                hint=MAKE_AGAIN,
            )
        metadata_type = METADATA_TYPES[kind]
        return metadata_type.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = complaints(error, metadata_type, owner="its metadata")[0]
        raise CheckpointError(
            f"{path}: its metadata is damaged: {first.problem}.", hint=MAKE_AGAIN
        ) from error


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    produce: "Callable[[str], Array | Iterator[Array]]",
    metadata: TensorMetadata,
    *,
    force: bool,
    final_metadata: "Callable[[], TensorMetadata] | None" = None,
) -> None:
    """Write a tensor file, one tensor or block at a time, so that only one need be in memory.

    Args:
        path: The file to write: aside, flushed, then renamed.
        specs: The type and shape of every tensor.
        produce: Returns the tensor of a name, whole or as an iterator of its blocks; called once a
            name, in the order of the file.
        metadata: What the file says of itself.
        force: Whether an existing file may be replaced.
        final_metadata: Called when all tensors are written, and put in place of ``metadata``, whose
            length it has in JSON: for hashes that are computed while tensors are written.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    with written_aside(path, force=force) as aside:
        stream_tensors(aside, specs, produce, metadata, final_metadata=final_metadata)


def stream_tensors(
    aside: Path,
    specs: Mapping[str, TensorSpec],
    produce: "Callable[[str], Array | Iterator[Array]]",
    metadata: TensorMetadata,
    *,
    final_metadata: "Callable[[], TensorMetadata] | None" = None,
    digest: "hashlib._Hash | None" = None,
    room: int = 0,
) -> None:
    """Write a tensor file into one that ``written_aside`` has made.

    See ``write_tensors`` for the arguments, and ``header_of`` for ``room``. ``digest`` is given all
    bytes, with ``metadata`` in the header, before ``final_metadata`` is called.
    """
    # wide types first, so that every tensor is aligned
    ordered = sorted(specs.items(), key=lambda item: (-item[1].storage_type.num_bytes, item[0]))
    header = header_of(ordered, metadata, room=room)
    with aside.open("wb") as file:
        file.write(header)
        if digest is not None:
            digest.update(header)
        for name, spec in ordered:
            produced = produce(name)
            written = 0
            for block in produced if isinstance(produced, Iterator) else (produced,):
                content = _as_bytes(block)
                written += file.write(content)  # type: ignore[arg-type]
                if digest is not None:
                    digest.update(content.data)
            if written != spec.num_bytes:  # what is written comes from other files
                raise CheckpointError(
                    f"{aside}: {name} has {written:,} bytes where its type and shape take "
                    f"{spec.num_bytes:,}.",
                    hint="Copy the files that it is made from again from where they are whole.",
                )
        if final_metadata is not None:
            final = header_of(ordered, final_metadata(), room=room)
            assert len(final) == len(header)
            file.seek(0)
            file.write(final)


def header_of(
    ordered: Sequence[tuple[str, TensorSpec]], metadata: TensorMetadata, *, room: int = 0
) -> bytes:
    """Return the bytes before the first tensor: the header's length, then its JSON.

    Args:
        ordered: The tensors, in the order of the file.
        metadata: What the file says of itself.
        room: How many bytes to fill, with spaces after the JSON; 0 takes as few as can be.
    """
    header: dict[str, Any] = {
        "__metadata__": {METADATA_KEY: metadata.model_dump_json(by_alias=True)}
    }
    offset = 0
    for name, spec in ordered:
        end = offset + spec.num_bytes
        header[name] = header_entry(spec, offset, end)
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # safetensors aligns the first tensor to 8 bytes
    encoded += b" " * (room - 8 - len(encoded))
    return len(encoded).to_bytes(8, "little") + encoded


def header_entry(spec: TensorSpec, start: int, end: int) -> dict[str, Any]:
    """Return what a header says of a tensor whose bytes lie between two places."""
    return {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}


def spec_of(tensor: "np.ndarray[Any, Any] | torch.Tensor") -> TensorSpec:
    """Return the type and shape that a tensor has on disk."""
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(BY_NUMPY[name].safetensors, tuple(tensor.shape))


def save_tensors(
    path: Path,
    tensors: "Mapping[str, np.ndarray[Any, Any] | torch.Tensor]",
    metadata: TensorMetadata,
    *,
    force: bool,
) -> None:
    """Write tensors that are all in memory; see ``write_tensors``."""
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    write_tensors(path, specs, tensors.__getitem__, metadata, force=force)


def _as_bytes(tensor: "np.ndarray[Any, Any] | torch.Tensor") -> np.ndarray[Any, Any]:
    if not isinstance(tensor, np.ndarray):
        import torch

        flat = tensor.detach().cpu().contiguous().flatten()
        tensor = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
