"""A checkpoint or foreign model as a member of a fused file: what is stored, in how many bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ensemble_kit.choices import Dtype
from ensemble_kit.networks.loading import member_file_metadata, member_prefix
from ensemble_kit.networks.products import product_axes
from ensemble_kit.networks.storage import round_to
from ensemble_kit.networks.weights import count_stored, stored_specs
from ensemble_kit.store.dtypes import BY_NAME, DTYPES, FLOATING
from ensemble_kit.store.fused_size import NO_FILE, member_bytes, shared_bytes
from ensemble_kit.store.provenance import (
    CheckpointMetadata,
    FileMetadata,
    ForeignMetadata,
    MemberMetadata,
    ModelMetadata,
)
from ensemble_kit.store.tensor_files import TensorFile, TensorSpec


class Member(NamedTuple):
    """A member that is to be fused.

    Attributes:
        metadata: What the fused file says of it.
        file: Its checkpoint or foreign model, open.
        axes: The matrices of its products, from ``product_axes``.
    """

    metadata: MemberMetadata
    file: TensorFile
    axes: Mapping[str, int]

    @classmethod
    def of(
        cls,
        file: TensorFile,
        checkpoint: FileMetadata,
        *,
        name: str,
        dtype: Dtype,
        coefficient: float = 1.0,
    ) -> "Member":
        """Describe an open checkpoint or foreign model as a member.

        Args:
            file: The file.
            checkpoint: The same file, as the fused one names it.
            name: The member's name.
            dtype: The precision that it is stored in.
            coefficient: Its mixing coefficient.
        """
        described = member_file_metadata(file)
        metadata = MemberMetadata(
            name=name,
            coefficient=coefficient,
            dtype=dtype,
            recipe=described.recipe if isinstance(described, CheckpointMetadata) else None,
            mapping=described.mapping if isinstance(described, ForeignMetadata) else None,
            checkpoint=checkpoint,
            num_values=count_stored(file),
        )
        return cls(metadata, file, product_axes(file))

    def specs(self) -> dict[str, TensorSpec]:
        """Return the type and shape of each tensor of it in the fused file, by name there."""
        prefix = member_prefix(self.metadata.name)
        stored = stored_specs(self.file, self.axes, self.metadata.dtype)
        return {
            prefix + name + suffix: spec
            for name, specs in stored.items()
            for suffix, spec in specs.items()
        }


class RoundedTensors:
    """The tensors of a member as they are after rounding, floating ones in float32."""

    def __init__(self, member: Member) -> None:
        self.specs = {
            name: spec._replace(dtype=BY_NAME["fp32"].safetensors)
            if spec.dtype in FLOATING
            else spec
            for name, spec in member.file.specs.items()
        }
        self._member = member

    def tensor(self, name: str) -> Tensor:
        """Return a tensor's values after rounding."""
        member = self._member
        axis = member.axes.get(name)
        return round_to(
            member.file.tensor(name), member.metadata.dtype, output_axis=axis
        ).restored()


class RoundedTo(NamedTuple):
    """Rounds the weights of a member's file, for ``load``."""

    dtype: Dtype

    def tensors(self, file: TensorFile) -> RoundedTensors:
        """Return the tensors of an open checkpoint or foreign model, rounded."""
        name = member_file_metadata(file).name
        return RoundedTensors(Member.of(file, NO_FILE, name=name, dtype=self.dtype))


def model_metadata(
    file: TensorFile, folder: Path, *, repeats: int, dtype: Dtype | None = None
) -> ModelMetadata:
    """Describe an open checkpoint or foreign model for the metadata of its predictions.

    Args:
        file: The file.
        folder: The folder of the predictions.
        repeats: Draws whose probabilities are averaged; 1 where nothing is drawn.
        dtype: The precision that its weights were rounded to; None where they were not.
    """
    metadata = member_file_metadata(file)
    found = FileMetadata.of(file.path, folder, sha256=file.sha256())
    member = Member.of(file, found, name=metadata.name, dtype=DTYPES[0])
    sizes: dict[Dtype, int] = {}
    for each in DTYPES:
        stored = member._replace(metadata=member.metadata.model_copy(update={"dtype": each}))
        sizes[each] = member_bytes(stored.specs(), stored.metadata)
    return ModelMetadata(
        file=found,
        kind=metadata.kind,
        num_values=member.metadata.num_values,
        bytes_by_dtype=sizes,
        shared_bytes=shared_bytes(metadata.data_schema),
        dtype=dtype,
        repeats=repeats,
    )
