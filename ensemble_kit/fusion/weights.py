"""The weights of a fused file, rounded as they are written."""

from collections.abc import Sequence

from torch import Tensor

from ensemble_kit.errors import FusionError
from ensemble_kit.networks.blocks import block_scales, whole_numbers
from ensemble_kit.networks.fused_member import Member
from ensemble_kit.networks.loading import member_prefix
from ensemble_kit.networks.storage import Stored, is_finite, relative_error, round_to
from ensemble_kit.networks.weights import not_finite
from ensemble_kit.store.blocks import FORMATS, SCALE
from ensemble_kit.store.fused_size import member_bytes, member_room
from ensemble_kit.store.tensor_files import TensorSpec


class FusedWeights:
    """What the fused file stores: each member's tensors, rounded one at a time.

    Attributes:
        specs: The type and shape of every stored tensor, scales of blocks among them.
        num_bytes: What the members take in the file, the header's parts included.
        room: What they take in its header.
        coarse: Filled while tensors are produced; see ``FusedFile``.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.num_bytes = self.room = 0
        self.coarse: list[str] = []
        self._sources: dict[str, tuple[Member, str]] = {}
        self._scales: dict[str, Tensor] = {}
        for member in members:
            specs = member.specs()
            self.specs |= specs
            self.num_bytes += member_bytes(specs, member.metadata)
            self.room += member_room(specs, member.metadata)
            prefix = member_prefix(member.metadata.name)
            self._sources |= {prefix + name: (member, name) for name in member.file.specs}

    def produce(self, name: str) -> Tensor:
        """Return a stored tensor."""
        matrix = name.removesuffix(SCALE)
        if matrix + SCALE not in self.specs:
            return self._round(name).values
        scales = self._scales_of(matrix)
        if name != matrix:
            return scales
        member, source = self._sources[matrix]
        block_format = FORMATS[member.metadata.dtype]
        whole = whole_numbers(member.file.tensor(source), scales, block_format)
        return Stored(whole, scales, block_format).tensors()[""]

    def _scales_of(self, full: str) -> Tensor:
        """Return a matrix's scales, which are searched for once."""
        if full not in self._scales:
            member, name = self._sources[full]
            matrix, block_format = member.file.tensor(name), FORMATS[member.metadata.dtype]
            self._scales[full] = block_scales(matrix, member.axes[name], block_format)
        return self._scales[full]

    def _round(self, full: str) -> Stored:
        member, name = self._sources[full]
        tensor, dtype = member.file.tensor(name), member.metadata.dtype
        stored = round_to(tensor, dtype)  # without an output axis: no blocks
        if tensor.is_floating_point() and not is_finite(stored.values):
            if not is_finite(tensor):
                raise not_finite(member.file.path, name)
            largest = float(tensor.abs().max())
            raise FusionError(
                f"{member.file.path}: {name} holds {largest:g}, too large for {dtype}.",
                hint="Fuse with --dtype bf16, which has the range of fp32.",
            )
        if dtype == "fp16" and tensor.is_floating_point():
            as_bf16 = relative_error(tensor, tensor.bfloat16())
            if relative_error(tensor, stored.values) > as_bf16:
                self.coarse.append(full)
        return stored
