"""Fuse: the members of a selection into one file, in the precisions they will be shipped in."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

from ensemble_kit._version import __version__
from ensemble_kit.choices import DTYPE, MAX_GAP_LOSS, MAX_SIZE, AnyPath, Dtype, Given, Mixing
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import Schema, check_fits
from ensemble_kit.errors import FusionError, shown
from ensemble_kit.files import refuse_overwrite, require_suffix, written_aside
from ensemble_kit.fusion.gap_loss import Loss, loss_on
from ensemble_kit.fusion.proof import forms_of, prove
from ensemble_kit.fusion.weights import FusedWeights
from ensemble_kit.networks.fused_member import Member
from ensemble_kit.networks.loading import member_file_metadata
from ensemble_kit.store.fused_size import shared_bytes
from ensemble_kit.store.provenance import (
    FUSIBLE,
    NO_HASH,
    CheckpointMetadata,
    FileMetadata,
    FoldsMetadata,
    FusedMetadata,
    ModelMetadata,
    ValidationMetadata,
    dtypes_of,
    schema_sha256,
)
from ensemble_kit.store.selection_file import SelectionMetadata, read_selection
from ensemble_kit.store.size_limit import refuse_size
from ensemble_kit.store.tensor_files import TensorFile, open_tensors, stream_tensors
from ensemble_kit.store.workspace import RUN_NAME, RunFolder
from ensemble_kit.wording import counted


@dataclass(frozen=True)
class FusedFile:
    """A fused file that has passed its proofs.

    Attributes:
        path: The file.
        num_bytes: Its size.
        max_size: The size limit, in bytes.
        members: The members' names.
        dtypes: The precision that each is stored in.
        loss: What rounding the weights changed: on the given records, or else on a few synthetic
            frames.
        coarse: Tensors that fp16 stores less accurately than bf16 would, because their numbers are
            so near 0.
        mixing: How the members are mixed; ``given`` if the user gave the coefficients.
    """

    path: Path
    num_bytes: int
    max_size: int
    members: tuple[str, ...]
    dtypes: tuple[Dtype, ...]
    loss: Loss
    coarse: tuple[str, ...]
    mixing: Mixing | Given


def fuse(
    selection: AnyPath,
    output: AnyPath,
    *,
    dtype: Dtype | None = None,
    max_size: int = MAX_SIZE,
    records: Records | None = None,
    refit: AnyPath | None = None,
    max_gap_loss: float = MAX_GAP_LOSS,
    force: bool = False,
) -> FusedFile:
    """Write the members of a selection into one file and prove it equal to them.

    Every floating tensor of a member is stored in its precision, statistics of batch norm included,
    as S5 stored its system; see ``storage.round_to`` for what int8 and int4 do. Tensors pass
    through memory one at a time. Before the file is kept, each member is run from it and from its
    own checkpoint rounded to that precision: the two must agree.

    Args:
        selection: A ``selection.json``.
        output: The file to write.
        dtype: The precision of all members; None takes the one in which each was selected.
        max_size: Maximum file size, in bytes.
        records: Validation records to measure GAP on before and after rounding.
        refit: The folder of the runs that members which were selected by out-of-fold predictions
            are fused from: each has the member's name, and was trained on all records with the
            recipe and the schema of its folds. None where there are no such members.
        max_gap_loss: How far rounding may lower GAP on them.
        force: Whether an existing file may be replaced.

    Raises:
        SelectionError: The selection cannot be read.
        CheckpointError: A member's file is damaged or holds NaN or infinity.
        FusionError: A member has changed since it was selected, is no checkpoint, does not belong
            with the others, or does not fit into its precision; rounding costs more than
            ``max_gap_loss``; or the file disagrees with its members.
        PredictionsError: The records are not of the members' modalities or vocabulary.
        SizeLimitError: The file would be larger than ``max_size``.
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
    """
    selection, output = Path(selection), Path(output)
    refuse_overwrite(output, force=force)
    require_suffix(output, ".safetensors")
    chosen = read_selection(selection)
    with ExitStack() as stack:
        runs = None if refit is None else Path(refit)
        members = list(_open_members(selection, chosen, dtype, runs, stack, output.parent))
        schema = _common_schema(members)
        if records is not None:
            check_fits(schema, records.schema, path=selection)
        origin = FileMetadata.of(selection, output.parent)
        metadata = _describe(members, schema, origin, chosen)
        shared = shared_bytes(schema, origin)
        weights = FusedWeights(members)
        num_bytes = shared + weights.num_bytes
        refuse_size("fused", num_bytes, max_size, members=metadata.members, selection=chosen)
        room = shared + weights.room
        with written_aside(output, force=force) as aside:
            digest = hashlib.sha256()
            stream_tensors(
                aside,
                weights.specs,
                weights.produce,
                metadata,
                final_metadata=lambda: metadata.model_copy(
                    update={"content_sha256": digest.hexdigest()}
                ),
                digest=digest,
                room=room,
            )
            _require_size(aside, num_bytes, output)
            with open_tensors(aside) as file:
                loss = prove(file, members, metadata, name=output)
                if records is not None:
                    loss = _measure(file, members, metadata, records, max_gap_loss, output)
    return FusedFile(
        output,
        num_bytes,
        max_size,
        tuple(member.name for member in metadata.members),
        tuple(member.dtype for member in metadata.members),
        loss,
        tuple(weights.coarse),
        chosen.mixing,
    )


def _describe(
    members: Sequence[Member], schema: Schema, origin: FileMetadata, chosen: SelectionMetadata
) -> FusedMetadata:
    """Return the metadata of the fused file of members that the selection ``origin`` chose."""
    return FusedMetadata(
        kit_version=__version__,
        members=tuple(member.metadata for member in members),
        data_schema=schema,
        selection=origin,
        validation=ValidationMetadata(
            metric=chosen.metric,
            score=chosen.score,
            k=chosen.k,
            videos=chosen.videos,
            dataset_sha256=chosen.dataset_sha256,
            repeats=max(m.model.repeats for m in chosen.members if m.model is not None),
            is_refit=any(m.model.folds is not None for m in chosen.members if m.model is not None),
        ),
        top_k=chosen.k,
        content_sha256=NO_HASH,
    )


def _open_members(
    selection: Path,
    chosen: SelectionMetadata,
    dtype: Dtype | None,
    refit: Path | None,
    stack: ExitStack,
    folder: Path,
) -> Iterator[Member]:
    for member in chosen.members:
        model = member.model
        if model is None or (model.kind not in FUSIBLE and model.folds is None):
            kind = "predictions without a model" if model is None else model.kind
            raise FusionError(
                f"{selection}: member {member.name} is {kind}; only checkpoints and "
                "foreign models can be fused.",
                hint="Select again without it.",
            )
        if not re.fullmatch(RUN_NAME, member.name):
            raise FusionError(
                f"{selection}: {shown(member.name)} cannot name a member of a graph.",
                hint="Select again with `ensemble-kit select`.",
            )
        if model.folds is not None:
            file = _open_refit(selection, member.name, model.folds, refit, stack)
        else:
            file = _open_selected(selection, member.name, model, stack)
        digest = file.sha256()
        if model.folds is None and digest != model.file.sha256:
            raise FusionError(
                f"{file.path} has changed since member {member.name} was selected.",
                hint="Predict and select again, so that the selection describes what is fused.",
            )
        yield Member.of(
            file,
            FileMetadata.of(file.path, folder, sha256=digest),
            name=member.name,
            dtype=dtype or member.dtype or DTYPE,
            coefficient=member.coefficient,
        )


def _open_selected(
    selection: Path, name: str, model: ModelMetadata, stack: ExitStack
) -> TensorFile:
    """Open the file whose predictions a member was selected by."""
    path = selection.parent / model.file.path
    if not isfile(path):
        raise FusionError(
            f"{selection}: the checkpoint of member {name}, {path}, does not exist.",
            hint="Put it back, or predict and select again.",
        )
    return stack.enter_context(open_tensors(path))


def _open_refit(
    selection: Path, name: str, folds: FoldsMetadata, refit: Path | None, stack: ExitStack
) -> TensorFile:
    """Open what a member's recipe has become on all records; its folds' models are not shipped."""
    if refit is None:
        raise FusionError(
            f"{selection}: member {name} was selected by out-of-fold predictions, of "
            f"{counted(len(folds.checkpoints), 'model')} that have not seen all records.",
            hint=f"Train {name} again without --fold, and name the folder of its run with --refit.",
        )
    path = RunFolder(refit / name).averaged
    if not isfile(path):
        raise FusionError(
            f"{path}, the final member {name}, does not exist.",
            hint=f"Train {folds.recipe.name} again without --fold, as the run {refit / name}.",
        )
    file = stack.enter_context(open_tensors(path))
    metadata = file.metadata_as(CheckpointMetadata)
    differences = (
        ("holds out a fold of the records", metadata.fold is not None),
        ("has another recipe than its folds", metadata.recipe != folds.recipe),
        (
            "has another schema than its folds",
            schema_sha256(metadata.data_schema) != folds.schema_sha256,
        ),
    )
    for what, differs in differences:
        if differs:
            raise FusionError(
                f"{path} {what}.",
                hint=f"Train {folds.recipe.name} with the values of its folds, but without --fold.",
            )
    return file


def _require_size(aside: Path, num_bytes: int, output: Path) -> None:
    """Raise ``FusionError`` unless a file takes the bytes that selection counted for it."""
    size = aside.stat().st_size
    if size != num_bytes:
        raise FusionError(
            f"{output} would take {size:,} bytes where {num_bytes:,} were counted.",
            hint="Report this as a bug in ensemble-kit; nothing was written.",
        )


def _common_schema(members: list[Member]) -> Schema:
    first = member_file_metadata(members[0].file).data_schema
    for member in members[1:]:
        schema = member_file_metadata(member.file).data_schema
        for difference in schema.differences(first):
            others = f"members before it, such as {members[0].file.path},"
            raise FusionError(
                difference.between(str(member.file.path), others),
                hint="Fuse members that were trained on records of one schema.",
            )
    return first


def _measure(
    file: TensorFile,
    members: Sequence[Member],
    metadata: FusedMetadata,
    records: Records,
    max_gap_loss: float,
    output: Path,
) -> Loss:
    """Measure GAP before and after rounding.

    Raises:
        FusionError: It falls by more than ``max_gap_loss``.
    """
    k = metadata.top_k
    loss = loss_on(records, [forms_of(member, file, metadata) for member in members], k=k)
    assert loss.gap_before is not None
    assert loss.gap_after is not None
    if loss.gap_before - loss.gap_after > max_gap_loss:
        raise FusionError(
            f"{output}: in {' and '.join(dtypes_of(metadata.members))} GAP@{k} falls by "
            f"{loss.gap_before - loss.gap_after:.4f}, from {loss.gap_before:.4f} to "
            f"{loss.gap_after:.4f} on {counted(loss.num_videos, 'video')}; the limit is "
            f"{max_gap_loss:g}.",
            hint="Fuse with another --dtype, or raise --max-gap-loss.",
        )
    return loss
