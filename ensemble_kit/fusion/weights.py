"""The weights of a fused file, rounded as they are written."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ensemble_kit.choices import Dtype
from ensemble_kit.errors import FusionError
from ensemble_kit.networks.blocks import block_scales, fits_blocks, whole_numbers
from ensemble_kit.networks.loading import member_prefix
from ensemble_kit.networks.storage import Stored, is_finite, relative_error, round_to
from ensemble_kit.networks.weights import not_finite
from ensemble_kit.store.blocks import FORMATS, SCALE
from ensemble_kit.store.dtypes import BY_NAME, FLOATING
from ensemble_kit.store.provenance import MemberMetadata
from ensemble_kit.store.tensor_files import TensorFile, TensorSpec, spec_of


class Member(NamedTuple):
    """A member that is to be fused.

    Attributes:
        metadata: The member's entry in the fused file's metadata.
        file: Its checkpoint or foreign model, open.
        axes: The matrices of its products, from ``product_axes``.
    """

    metadata: MemberMetadata
    file: TensorFile
    axes: Mapping[str, int]


class RoundedTensors:
    """The tensors of a member's file as they are after rounding, floating ones in float32.

    Args:
        file: The checkpoint or foreign model.
        dtype: The type that they are rounded to.
        axes: The matrices of products, from ``product_axes``.
    """

    def __init__(self, file: TensorFile, dtype: Dtype, axes: Mapping[str, int]) -> None:
        self.specs = {
            name: spec._replace(dtype="F32") if spec.dtype in FLOATING else spec
            for name, spec in file.specs.items()
        }
        self._file, self._dtype, self._axes = file, dtype, axes

    def tensor(self, name: str) -> Tensor:
        """Return a tensor's values after rounding."""
        axis = self._axes.get(name)
        return round_to(self._file.tensor(name), self._dtype, output_axis=axis).restored()


class FusedWeights:
    """What the fused file stores: each member's tensors, rounded one at a time.

    Attributes:
        specs: The type and shape of every stored tensor, scales of blocks among them.
        coarse: Filled while tensors are produced; see ``FusedFile``.
    """

    def __init__(self, members: Sequence[Member], dtype: Dtype) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.coarse: list[str] = []
        self._dtype = dtype
        self._sources: dict[str, tuple[Member, str]] = {}
        self._scales: dict[str, Tensor] = {}
        for member in members:
            for name, spec in member.file.specs.items():
                full = member_prefix(member.metadata.name) + name
                self._sources[full] = member, name
                self.specs |= self._specs_of(full, spec)

    def produce(self, name: str) -> Tensor:
        """Return a stored tensor."""
        if name in self._scales:
            return self._scales[name]
        scales = self._scales.get(name + SCALE)
        if scales is None:
            return self._round(name).values
        member, source = self._sources[name]
        whole = whole_numbers(member.file.tensor(source), scales, FORMATS[self._dtype])
        return Stored(whole, scales, FORMATS[self._dtype]).tensors()[""]

    def _specs_of(self, full: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Return what is stored for a tensor; this computes the scales of a matrix in blocks."""
        block_format = FORMATS.get(self._dtype)
        if spec.dtype not in FLOATING:
            return {full: spec}
        if block_format is None:
            return {full: spec._replace(dtype=BY_NAME[self._dtype].safetensors)}
        member, name = self._sources[full]
        output_axis = member.axes.get(name)
        if output_axis is not None:
            matrix = member.file.tensor(name)
            if fits_blocks(matrix, output_axis, block_format):
                scales = block_scales(matrix, output_axis, block_format)
                self._scales[full + SCALE] = scales
                packed = TensorSpec(
                    BY_NAME[self._dtype].safetensors, block_format.packed_shape(spec.shape)
                )
                return {full: packed, full + SCALE: spec_of(scales)}
        return {full: spec._replace(dtype="BF16")}

    def _round(self, full: str) -> Stored:
        member, name = self._sources[full]
        tensor = member.file.tensor(name)
        # what does not fit into blocks is in bf16
        stored = round_to(tensor, "bf16" if self._dtype in FORMATS else self._dtype)
        if tensor.is_floating_point() and not is_finite(stored.values):
            if not is_finite(tensor):
                raise not_finite(member.file.path, name)
            largest = float(tensor.abs().max())
            raise FusionError(
                f"{member.file.path}: {name} holds {largest:g}, too large for {self._dtype}.",
                hint="Fuse with --dtype bf16, which has the range of fp32.",
            )
        if self._dtype == "fp16" and tensor.is_floating_point():
            as_bf16 = relative_error(tensor, tensor.bfloat16())
            if relative_error(tensor, stored.values) > as_bf16:
                self.coarse.append(full)
        return stored
