"""Fuse: the members of a selection into one file, in the type they will be shipped in."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ensemble_kit
from ensemble_kit.checkpoints import FLOATING, TensorFile, TensorSpec, open_tensors, write_tensors
from ensemble_kit.data.schema import Schema
from ensemble_kit.ensemble import example_frames, round_to
from ensemble_kit.errors import FusionError, SizeLimitError
from ensemble_kit.files import GIB, format_size, refuse_overwrite, sha256_of, written_aside
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.loading import count_stored, load_fused_member, load_sub_model, member_prefix
from ensemble_kit.provenance import (
    BYTES_PER_VALUE,
    CheckpointRecord,
    Dtype,
    FileRecord,
    FusedRecord,
    MemberRecord,
    SelectionRecord,
)
from ensemble_kit.selections import read_selection

STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
TOLERANCE = 1e-6  # float32 sums of the same numbers in the same order; 8 eps of a probability


@dataclass(frozen=True)
class FusedFile:
    """A fused file that has passed its proofs.

    Attributes:
        path: Where it lies.
        num_bytes: Its size.
        max_size: The limit it fits.
        members: The members' names.
        worst_change: The largest change of any probability by rounding the weights, on the frames
            that the proof was made with.
    """

    path: Path
    num_bytes: int
    max_size: int
    members: tuple[str, ...]
    worst_change: float


class _Member(NamedTuple):
    record: MemberRecord
    file: TensorFile


def fuse(
    selection: Path,
    output: Path,
    *,
    dtype: Dtype = "bf16",
    max_size: int = GIB,
    force: bool = False,
) -> FusedFile:
    """Write the members of a selection into one file and prove it equal to them.

    Every floating tensor is stored in ``dtype``, statistics of batch norm included, as S5 stored
    its system. Tensors pass through memory one at a time. Before the file is kept, each member is
    run from it and from its own checkpoint rounded to ``dtype``: the two must agree.

    Args:
        selection: A ``selection.json``.
        output: The file to write.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        max_size: The most bytes the file may have.
        force: Whether an existing file may be replaced.

    Raises:
        SelectionError: The selection cannot be read.
        FusionError: A member has changed since it was selected, is no checkpoint, or does not
            belong with the others; or the file disagrees with its members.
        SizeLimitError: The file would be larger than ``max_size``.
        OutputError: ``output`` exists and ``force`` is False.
    """
    refuse_overwrite(output, force=force)
    chosen = read_selection(selection)
    with ExitStack() as stack:
        members = list(_open_members(selection, chosen, stack, output.parent))
        schema = _common_schema(members)
        specs = {
            member_prefix(member.record.name) + name: _stored(spec, dtype)
            for member in members
            for name, spec in member.file.specs.items()
        }
        record = FusedRecord(
            kit_version=ensemble_kit.__version__,
            dtype=dtype,
            members=tuple(member.record for member in members),
            data_schema=schema,
            selection=FileRecord(
                path=relpath(selection, output.parent), sha256=sha256_of(selection)
            ),
            validation_gap=chosen.gap,
            top_k=chosen.k,
        )
        files = {member_prefix(member.record.name): member.file for member in members}
        values = sum(spec.num_values for spec in specs.values()) * BYTES_PER_VALUE[dtype]
        _refuse_size(values, max_size, chosen, dtype, overhead=0)
        with written_aside(output, force=force) as aside:
            write_tensors(aside, specs, lambda n: _rounded(files, n, dtype), record, force=True)
            num_bytes = aside.stat().st_size
            _refuse_size(num_bytes, max_size, chosen, dtype, overhead=num_bytes - values)
            worst = _prove(aside, members, record, output)
    names = tuple(member.record.name for member in members)
    return FusedFile(output, num_bytes, max_size, names, worst)


def _open_members(
    selection: Path, chosen: SelectionRecord, stack: ExitStack, folder: Path
) -> Iterator[_Member]:
    for member in chosen.members:
        if member.model is None or member.model.kind != "checkpoint":
            kind = "predictions without a model" if member.model is None else member.model.kind
            raise FusionError(
                f"{selection}: member {member.name} is {kind}; only checkpoints can be fused.",
                mend="Select again without it.",
            )
        path = selection.parent / member.model.file.path
        if not path.is_file():
            raise FusionError(
                f"{selection}: the checkpoint of member {member.name}, {path}, does not exist.",
                mend="Put it back, or predict and select again.",
            )
        digest = sha256_of(path)
        if digest != member.model.file.sha256:
            raise FusionError(
                f"{path} has changed since member {member.name} was selected.",
                mend="Predict and select again, so that the selection is of what is fused.",
            )
        file = stack.enter_context(open_tensors(path))
        record = file.record(CheckpointRecord)
        yield _Member(
            MemberRecord(
                name=member.name,
                coefficient=member.coefficient,
                recipe=record.recipe,
                checkpoint=FileRecord(path=relpath(path, folder), sha256=digest),
                num_values=count_stored(file),
            ),
            file,
        )


def _common_schema(members: list[_Member]) -> Schema:
    first = members[0].file.record(CheckpointRecord).data_schema
    for member in members[1:]:
        schema = member.file.record(CheckpointRecord).data_schema
        for what, same in (
            ("modalities", schema.interface == first.interface),
            ("label names", schema.vocabulary_sha256 == first.vocabulary_sha256),
        ):
            if not same:
                raise FusionError(
                    f"{member.file.path} has other {what} than {members[0].file.path}.",
                    mend="Fuse members that were trained on records of one schema.",
                )
    return first


def _stored(spec: TensorSpec, dtype: Dtype) -> TensorSpec:
    return spec._replace(dtype=STORED[dtype]) if spec.dtype in FLOATING else spec


def _rounded(files: Mapping[str, TensorFile], name: str, dtype: Dtype) -> Tensor:
    prefix = next(prefix for prefix in files if name.startswith(prefix))
    tensor = round_to(files[prefix].tensor(name.removeprefix(prefix)), dtype)
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise FusionError(
            f"{files[prefix].path}: {name.removeprefix(prefix)} is too large for {dtype}.",
            mend="Fuse with --dtype bf16, which has the range of fp32.",
        )
    return tensor


def _refuse_size(
    num_bytes: int, max_size: int, chosen: SelectionRecord, dtype: Dtype, *, overhead: int
) -> None:
    """Raise if a file is over the limit; ``overhead`` is what it has beside its members' values."""
    if num_bytes <= max_size:
        return
    excess = num_bytes - max_size
    fault = (
        f"The fused file has {num_bytes:,} bytes ({format_size(num_bytes)}), "
        f"{excess:,} bytes ({format_size(excess)}) over the limit of {format_size(max_size)}."
    )
    if len(chosen.members) == 1:
        raise SizeLimitError(fault, mend="Train a smaller member, or raise --max-size.")
    cheapest = max(chosen.members, key=lambda member: (member.gap_without, member.bytes))
    raise SizeLimitError(
        f"{fault} Dropping {cheapest.name} costs least: GAP@{chosen.k} {chosen.gap:.4f} becomes "
        f"{cheapest.gap_without:.4f}, and {format_size(cheapest.bytes)} are saved.",
        mend=f"Select again with --dtype {dtype} --max-size {max_size - overhead}, or raise "
        "--max-size here.",
    )


def _prove(aside: Path, members: list[_Member], record: FusedRecord, output: Path) -> float:
    """Run each member from both files; return the largest change that rounding made.

    One member at a time is in memory, in float32, from its checkpoint or from the fused file.
    """
    prepared = prepare_frames(*example_frames(record.data_schema, 4, 12))
    exact = torch.zeros(())
    fused = torch.zeros(())
    with open_tensors(aside) as file, torch.inference_mode():
        for member in members:
            model = load_sub_model(member.file)
            draws = model.draws_for(member.record.name, repeats=1)
            exact = exact + member.record.coefficient * model.classify(prepared, draws)
            state = {
                name: round_to(tensor, record.dtype).to(tensor.dtype)
                for name, tensor in model.state_dict().items()
            }
            model.load_state_dict(state, assign=True)
            alone = model.classify(prepared, draws)
            del model, state
            model = load_fused_member(file, member.record, record.data_schema)
            again = model.classify(prepared, draws)
            difference = float((alone - again).abs().max())
            if not difference <= TOLERANCE:
                raise FusionError(
                    f"{output}: member {member.record.name} differs by {difference:.2g} from "
                    f"{member.file.path} rounded to {record.dtype}; {TOLERANCE:.0e} may be.",
                    mend="Report this as a fault of ensemble-kit; nothing was written.",
                )
            fused = fused + member.record.coefficient * again
    return float((exact - fused).abs().max())
