"""The proof that a fused file computes what its members do, and what rounding them changed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ensemble_kit.errors import FusionError
from ensemble_kit.fusion.gap_loss import Forms, Loss
from ensemble_kit.layers.frame_preparation import PreparedFrames, prepare_frames
from ensemble_kit.networks.ensemble import example_frames, longest_proof
from ensemble_kit.networks.fused_member import Member, RoundedTensors
from ensemble_kit.networks.loading import load_fused_member, load_member
from ensemble_kit.networks.member import MemberModel
from ensemble_kit.store.provenance import FusedMetadata
from ensemble_kit.store.tensor_files import TensorFile

TOLERANCE = 1e-6  # float32 sums of the same numbers in the same order; 8 eps of a probability
SHORT, NUM_LONG = (4, 12), 2  # videos and frames of the first batch; videos of the longest frames


def forms_of(member: Member, file: TensorFile, metadata: FusedMetadata) -> Forms:
    """Return the functions that load a member before and after rounding.

    Args:
        member: The member.
        file: The fused file, open.
        metadata: What the fused file says of itself.
    """
    return Forms(
        member.metadata.name,
        member.metadata.coefficient,
        partial(load_member, member.file),
        partial(load_fused_member, file, member.metadata, metadata.data_schema),
    )


def prove(
    file: TensorFile, members: Sequence[Member], metadata: FusedMetadata, *, name: Path
) -> Loss:
    """Run each member from both files; return what rounding changed.

    One member at a time is in memory, in float32, from its checkpoint or from the fused file. The
    frames are made up; some videos are as long as any of the members' records.

    Args:
        file: The fused file, open.
        members: Its members.
        metadata: What it says of itself.
        name: What errors call it.

    Raises:
        FusionError: A member of the file disagrees with its own checkpoint, rounded.
        ForeignModelError: ONNX Runtime cannot run a foreign member.
    """
    batches = _batches(metadata)
    changes = [torch.zeros(()) for _ in batches]
    with torch.inference_mode():
        for member in members:
            forms = forms_of(member, file, metadata)
            exact = _run(forms.exact(), forms.name, batches)
            tensors = RoundedTensors(member)
            alone = _run(load_member(member.file, tensors), forms.name, batches)
            again = _run(forms.rounded(), forms.name, batches)
            difference = max(
                float((one - other).abs().max()) for one, other in zip(alone, again, strict=True)
            )
            if not difference <= TOLERANCE:
                raise FusionError(
                    f"{name}: member {forms.name} differs by {difference:.2g} from "
                    f"{member.file.path} rounded to {member.metadata.dtype}; the tolerance "
                    f"is {TOLERANCE:.0e}.",
                    hint="Report this as a bug in ensemble-kit; nothing was written.",
                )
            for index, (before, after) in enumerate(zip(exact, again, strict=True)):
                changes[index] = changes[index] + forms.coefficient * (after - before)
    all_changes = torch.cat([change.abs().flatten() for change in changes])
    return Loss(float(all_changes.max()), float(all_changes.mean()))


def _batches(metadata: FusedMetadata) -> list[PreparedFrames]:
    sizes = [SHORT, (NUM_LONG, longest_proof(metadata.data_schema, metadata.members))]
    batches = []
    for videos, length in sizes:
        frames, num_frames = example_frames(metadata.data_schema, videos, length)
        num_frames[0] = length
        batches.append(prepare_frames(frames, num_frames))
    return batches


def _run(model: MemberModel, name: str, batches: Sequence[PreparedFrames]) -> list[Tensor]:
    """Return a member's probabilities; nothing keeps the model afterwards."""
    draws = model.draws_for(name, repeats=1)
    return [model.classify(batch, draws) for batch in batches]
