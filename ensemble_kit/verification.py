"""Verify: recompute what a fused or ONNX file claims of itself."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from os.path import isfile, normpath
from pathlib import Path
from typing import Literal

import torch

from ensemble_kit.choices import MAX_GAP_LOSS, MAX_SIZE, METRIC, TOP_K, AnyPath, Dtype
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import CheckpointError, EnsembleKitError, PredictionsError
from ensemble_kit.export.parity import TOLERANCE, compare, shares_as_shipped
from ensemble_kit.export.shares import counts_of
from ensemble_kit.files import format_size, sha256_of
from ensemble_kit.fusion.proof import prove
from ensemble_kit.fusion.weights import FusedWeights
from ensemble_kit.networks.fused_member import Member
from ensemble_kit.networks.loading import load, member_prefix
from ensemble_kit.networks.products import product_axes
from ensemble_kit.predictions.videos import dataset_sha256
from ensemble_kit.serving.metadata import metadata_of
from ensemble_kit.serving.onnx_file import (
    StoredTensor,
    is_whole,
    needed_files,
    read_properties,
    read_tensors,
    values_path,
)
from ensemble_kit.serving.session import without_prefix
from ensemble_kit.store.blocks import SCALE
from ensemble_kit.store.dtypes import FLOATING, types_of_onnx_weights, types_of_weights
from ensemble_kit.store.provenance import (
    FileMetadata,
    FusedMetadata,
    MemberMetadata,
    OnnxMetadata,
    ValidationMetadata,
    dtypes_of,
)
from ensemble_kit.store.tensor_files import TensorFile, open_tensors
from ensemble_kit.wording import counted, metric_name

Verdict = Literal["holds", "fails", "not checked"]


@dataclass(frozen=True)
class Claim:
    """One claim of a file, and whether it holds.

    Attributes:
        name: ``content``, ``bytes``, ``weights``, ``parents``, ``parity``,
            ``products`` or ``score``.
        verdict: ``not checked`` where something that is needed is not there.
        finding: What was found, in one line.
    """

    name: str
    verdict: Verdict
    finding: str


def verify(
    path: AnyPath,
    records: Records | None = None,
    *,
    fused: AnyPath | None = None,
    max_size: int = MAX_SIZE,
    max_gap_loss: float = MAX_GAP_LOSS,
) -> list[Claim]:
    """Recompute what a fused or an ONNX file claims of itself.

    Args:
        path: The file.
        records: The validation records, to measure GAP on.
        fused: The fused file that an ONNX file was exported from; None looks beside it for the one
            whose hash it names.
        max_size: Maximum size of all files that are needed to run it, in bytes.
        max_gap_loss: How far the score may fall short of what is claimed.

    Returns:
        One claim for each check. For a fused file: its bytes, the types of its weights, its
        parents' hashes, every weight compared with its rounded checkpoint's, GAP. For an ONNX file:
        the hash of its content, its bytes, the types of its weights, its probabilities compared
        with the fused file's, how its numbers are used, GAP.

    Raises:
        CheckpointError: The file is missing, is no whole safetensors file or no fused one.
        ExportError: It is no whole ONNX file, or one whose values lie outside of its folder.
        ProviderError: It is an ONNX file that ensemble-kit did not write.
        PredictionsError: The records are not of its modalities or vocabulary.
    """
    path, fused = Path(path), None if fused is None else Path(fused)
    if path.suffix.lower() == ".onnx":
        return list(_verify_onnx(path, records, fused, max_size, max_gap_loss))
    with open_tensors(path) as file:
        return list(_verify_fused(file, records, max_size, max_gap_loss))


def _verify_onnx(
    path: Path, records: Records | None, fused: Path | None, max_size: int, max_gap_loss: float
) -> Iterator[Claim]:
    properties, tensors = read_properties(path), read_tensors(path)
    metadata = metadata_of(without_prefix(properties), path)
    counts = counts_of(tensors, metadata)
    yield _content(path, properties, metadata)
    yield _bytes(needed_files(path, tensors), max_size)
    yield _onnx_types(tensors, metadata)
    yield _tried("parity", lambda: _onnx_parity(path, metadata, counts, fused))
    yield _tried("products", lambda: _products(path, metadata, counts))
    yield _tried("score", lambda: _score(path, metadata.validation, None, records, max_gap_loss))


def _verify_fused(
    file: TensorFile, records: Records | None, max_size: int, max_gap_loss: float
) -> Iterator[Claim]:
    metadata = file.metadata_as(FusedMetadata)
    validation = metadata.validation
    repeats = validation.repeats if validation else None
    yield _content_claim(file.is_whole(metadata.content_sha256), "the content")
    yield _bytes([file.path], max_size)
    yield _fused_types(file, metadata)
    hashes = _hashes(file.path, metadata)
    yield _parents(metadata, hashes)
    yield _tried("parity", lambda: _fused_parity(file, metadata, hashes))
    yield _tried("score", lambda: _score(file.path, validation, repeats, records, max_gap_loss))


def _tried(name: str, check: Callable[[], Claim]) -> Claim:
    """Make a check; a file that cannot even be run does not hold the claim."""
    try:
        return check()
    except PredictionsError:
        raise  # of records that belong to another file
    except EnsembleKitError as error:
        return Claim(name, "fails", " ".join(error.problem.split()))


def _verdict(holds: bool) -> Verdict:
    return "holds" if holds else "fails"


def _content(path: Path, properties: Mapping[str, str], metadata: OnnxMetadata) -> Claim:
    beside = metadata.weights_file
    holds = is_whole(path, properties)
    what = "the content"
    if holds and beside is not None:
        holds, what = _hash_beside(path, beside) == beside.sha256, beside.path
    return _content_claim(holds, what)


def _content_claim(holds: bool, what: str) -> Claim:
    are = "the one it names" if holds else "not the one it names"
    return Claim("content", _verdict(holds), f"the SHA-256 of {what} is {are}")


def _hash_beside(path: Path, beside: FileMetadata) -> str:
    other = values_path(path, Path(beside.path).name)  # of a name in its own folder only
    return sha256_of(other) if isfile(other) else ""


def _bytes(files: Sequence[Path], max_size: int) -> Claim:
    size = sum(file.stat().st_size for file in files)
    what = "1 file" if len(files) == 1 else f"{len(files)} files"
    finding = f"{size:,} in {what} ({format_size(size, like=max_size)}) of {format_size(max_size)}"
    return Claim("bytes", _verdict(size <= max_size), finding)


def _onnx_types(tensors: Sequence[StoredTensor], metadata: OnnxMetadata) -> Claim:
    dtypes = _dtypes(metadata.members)
    types = {tensor.name: tensor.type_name for tensor in tensors}
    wanted = {
        name: {*types_of_onnx_weights(dtypes[_prefix(name)], metadata.opset)}
        for name in types
        if _prefix(name) in dtypes and not name.endswith(SCALE)
    }
    return _types(metadata.members, types, wanted)


def _fused_types(file: TensorFile, metadata: FusedMetadata) -> Claim:
    dtypes = _dtypes(metadata.members)
    types = {name: spec.dtype for name, spec in file.specs.items()}
    wanted = {
        name: {each.safetensors for each in types_of_weights(dtypes[_prefix(name)])}
        for name in types
        if _prefix(name) in dtypes and not name.endswith(SCALE)
    }
    floating = {
        name: expected
        for name, expected in wanted.items()
        if types[name] in FLOATING or types[name] in expected
    }
    return _types(metadata.members, types, floating)


def _types(
    members: Sequence[MemberMetadata], types: Mapping[str, str], wanted: Mapping[str, set[str]]
) -> Claim:
    """Look at the type of each weight.

    Args:
        members: The members of the file.
        types: The type of each tensor, by name.
        wanted: The types that each weight may have, by name.
    """
    precisions = " and ".join(dtypes_of(members))
    if not wanted and all(member.recipe is None for member in members):
        return Claim("weights", "holds", "there are none: trees and the like stay in their graphs")
    wrong = [name for name, expected in wanted.items() if types[name] not in expected]
    if wrong or not wanted:
        finding = f"{wrong[0]} is {types[wrong[0]]}" if wrong else "there are none"
        return Claim("weights", "fails", f"{finding}; the file claims {precisions}")
    counts = Counter(types[name] for name in wanted)
    found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return Claim("weights", "holds", f"the types of {precisions} only: {found}")


def _dtypes(members: Sequence[MemberMetadata]) -> dict[str, Dtype]:
    """Return the precision of each member, by the prefix of its tensors' names."""
    return {member_prefix(member.name): member.dtype for member in members}


def _prefix(tensor: str) -> str:
    return f"{tensor.partition('.')[0]}."


def _parents_of(metadata: FusedMetadata) -> list[FileMetadata]:
    """Return the files that a fused file says it was made from."""
    return [
        *(member.checkpoint for member in metadata.members),
        *filter(None, [metadata.selection]),
    ]


def _hashes(path: Path, metadata: FusedMetadata) -> dict[str, str]:
    """Return the hashes of a fused file's parents that are there, by the path that it names."""
    return {
        parent.path: sha256_of(found)
        for parent in _parents_of(metadata)
        if isfile(found := _parent(path, parent))
    }


def _parents(metadata: FusedMetadata, hashes: Mapping[str, str]) -> Claim:
    """Compare the files that a fused file was made from with the hashes that it names."""
    parents = _parents_of(metadata)
    for parent in parents:
        if hashes.get(parent.path, parent.sha256) != parent.sha256:
            return Claim("parents", "fails", f"{parent.path} has another SHA-256 than is named")
    missing = [parent.path for parent in parents if parent.path not in hashes]
    if missing:
        finding = f"{len(missing)} of {len(parents)} are not there, {missing[0]} first"
        return Claim("parents", "not checked", finding)
    return Claim("parents", "holds", f"all {len(parents)} have the SHA-256 that is named")


def _parent(path: Path, parent: FileMetadata) -> Path:
    return Path(normpath(path.parent / parent.path))


def _fused_parity(file: TensorFile, metadata: FusedMetadata, hashes: Mapping[str, str]) -> Claim:
    """Compare every stored number with the members' checkpoints, rounded again."""
    with ExitStack() as stack:
        members = []
        for member in metadata.members:
            if hashes.get(member.checkpoint.path) != member.checkpoint.sha256:
                finding = f"{member.checkpoint.path} is not there as it was fused"
                return Claim("parity", "not checked", finding)
            path = _parent(file.path, member.checkpoint)
            checkpoint = stack.enter_context(open_tensors(path))
            members.append(Member(member, checkpoint, product_axes(checkpoint)))
        weights = FusedWeights(members)
        for name in sorted(weights.specs.keys() | file.specs.keys()):
            if file.specs.get(name) != weights.specs.get(name) or not torch.equal(
                file.tensor(name), weights.produce(name)
            ):
                return Claim("parity", "fails", f"{name} is not the checkpoint's, rounded")
        loss = prove(file, members, metadata, name=file.path)
    precisions = " and ".join(dtypes_of(metadata.members))
    finding = (
        f"all {len(file.specs)} tensors are the checkpoints', rounded to {precisions}, which "
        f"changes a probability of made-up videos by {loss.worst_change:.4f} at most"
    )
    return Claim("parity", "holds", finding)


def _onnx_parity(
    path: Path, metadata: OnnxMetadata, counts: Mapping[str, int], fused: Path | None
) -> Claim:
    found = fused or _fused_beside(path, metadata)
    if found is None:
        finding = f"no fused file with SHA-256 {metadata.fused_sha256[:12]}... is beside it"
        return Claim("parity", "not checked", finding)
    if fused is not None and sha256_of(fused) != metadata.fused_sha256:
        return Claim("parity", "fails", f"{found} has another SHA-256 than is named")
    if metadata.draw_source == "random" and metadata.draws:
        return Claim("parity", "not checked", "its draws are fresh in each run")
    with open_tensors(found) as file:
        parity = compare(path, metadata, counts, file)
    worst, shipped = parity.exact, parity.shipped
    finding = (
        f"probabilities differ by {worst.size:.2g} from {found.name}; the tolerance is "
        f"{TOLERANCE:.0e}"
    )
    if shipped is not None:
        finding += f"; as it is run they differ by {shipped.size:.2g}"
    return Claim("parity", _verdict(worst.is_allowed), finding)


def _products(path: Path, metadata: OnnxMetadata, counts: Mapping[str, int]) -> Claim:
    """Look at how ONNX Runtime uses the numbers; only mapped files may convert in every run."""
    shares = shares_as_shipped(path, metadata, counts)
    holds = shares.converted_in_every_run == 0 or metadata.weights_file is not None
    return Claim("products", _verdict(holds), f"numbers are used: {shares}")


def _fused_beside(path: Path, metadata: OnnxMetadata) -> Path | None:
    """Return the fused file beside that has the hash which an ONNX file names."""
    for other in sorted(path.parent.glob("*.safetensors")):
        with suppress(CheckpointError), open_tensors(other) as file:
            if file.kind == "fused" and file.sha256() == metadata.fused_sha256:
                return other
    return None


def _score(
    path: Path,
    claimed: ValidationMetadata | None,
    repeats: int | None,
    records: Records | None,
    max_gap_loss: float,
) -> Claim:
    """Measure what is claimed; it is compared on the very records of the claim."""
    if records is None:
        text = "nothing is claimed"
        if claimed is not None:
            text = f"{_claim_of(claimed)} is claimed; name those records to measure it"
        return Claim("score", "not checked", text)
    if claimed is not None and claimed.is_refit:
        text = f"{_claim_of(claimed)} is claimed, of models that had not seen them"
        return Claim("score", "not checked", text)
    if claimed is not None and claimed.metric not in ("gap", "map"):
        text = f"{_claim_of(claimed)} is claimed, which `ensemble-kit evaluate` can measure"
        return Claim("score", "not checked", text)
    metric, k = (claimed.metric, claimed.k) if claimed is not None else (METRIC, TOP_K)
    metrics = load(path, repeats=repeats).measure(records, k=k)
    score = {"gap": metrics.gap, "map": metrics.map}[metric]
    found = f"{metric_name(metric, k)} {score:.4f} on {counted(metrics.videos, 'video')}"
    if claimed is None:
        return Claim("score", "not checked", f"{found}; nothing is claimed")
    videos = [(video.id, video.classes) for video in records.videos()]
    labels = LabelLists.from_lists(classes for _, classes in videos)
    if dataset_sha256([name for name, _ in videos], labels) != claimed.dataset_sha256:
        other = f"{found}; {_claim_of(claimed)}, other ones, is claimed"
        return Claim("score", "not checked", other)
    holds = score >= claimed.score - max_gap_loss
    return Claim("score", _verdict(holds), f"{found}; {claimed.score:.4f} is claimed")


def _claim_of(claimed: ValidationMetadata) -> str:
    return f"{claimed.metric_name} {claimed.score:.4f} on {counted(claimed.videos, 'video')}"
