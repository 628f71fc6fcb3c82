"""The weights of a fused file, rounded as they are written.

Imports ``loading``, ``onnx_imported`` and ``storage``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ensemble_kit.choices import Dtype
from ensemble_kit.errors import FusionError
from ensemble_kit.networks.loading import member_prefix
from ensemble_kit.networks.storage import SCALE, Stored, is_finite, relative_error, round_to
from ensemble_kit.networks.weights import not_finite
from ensemble_kit.store.dtypes import BY_NAME, FLOATING
from ensemble_kit.store.provenance import MemberMetadata
from ensemble_kit.store.tensor_files import TensorFile, TensorSpec, spec_of


class Member(NamedTuple):
    """A member that is to be fused.

    Attributes:
        record: What the fused file says of it.
        file: Its checkpoint or imported file, open.
        axes: The matrices of its products, from ``product_axes``.
    """

    record: MemberMetadata
    file: TensorFile
    axes: Mapping[str, int]


class RoundedTensors:
    """The tensors of a member's file as they are after rounding, floating ones in float32.

    Args:
        file: The checkpoint or imported file.
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
        specs: The type and shape of every stored tensor, scales of int8 among them.
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
                full = member_prefix(member.record.name) + name
                self._sources[full] = member, name
                if dtype == "int8" or spec.dtype not in FLOATING:  # what int8 does, values decide
                    stored = self._round(full)
                    self.specs[full] = spec_of(stored.values)
                    if stored.scale is not None:
                        self._scales[full + SCALE] = stored.scale
                        self.specs[full + SCALE] = spec_of(stored.scale)
                else:
                    self.specs[full] = spec._replace(dtype=BY_NAME[dtype].safetensors)

    def produce(self, name: str) -> Tensor:
        """Return a stored tensor."""
        if name in self._scales:
            return self._scales[name]
        return self._round(name).values

    def _round(self, full: str) -> Stored:
        member, name = self._sources[full]
        tensor = member.file.tensor(name)
        stored = round_to(tensor, self._dtype, output_axis=member.axes.get(name))
        if tensor.is_floating_point() and not is_finite(stored.values):
            if not is_finite(tensor):
                raise not_finite(member.file.path, name)
            largest = float(tensor.abs().max())
            raise FusionError(
                f"{member.file.path}: {name} holds {largest:g}, too large for {self._dtype}.",
                hint="Fuse with --dtype bf16, which has the range of fp32.",
            )
        if self._dtype == "fp16" and tensor.is_floating_point():
            as_bf16 = relative_error(tensor, round_to(tensor, "bf16"))
            if relative_error(tensor, stored) > as_bf16:
                self.coarse.append(full)
        return stored
