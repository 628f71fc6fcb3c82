"""Export: a fused file as one ONNX model that averages repeated random frame samples."""

import glob
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os.path import exists, isfile
from pathlib import Path
from typing import NamedTuple, get_args

import onnx

from ensemble_kit._version import __version__
from ensemble_kit.choices import (
    DRAW_SOURCE,
    MAX_GAP_LOSS,
    MAX_SIZE,
    REPEATS,
    AnyPath,
    Computes,
    DrawSource,
    InputType,
    Opset,
)
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import check_fits
from ensemble_kit.errors import EnsembleKitError, ExportError, ProviderError
from ensemble_kit.export.graph import Graph, build_graph, top_k_of
from ensemble_kit.export.parity import TOLERANCE, compare
from ensemble_kit.export.shares import counts_of
from ensemble_kit.files import (
    refuse_overwrite,
    removed_on_failure,
    require_suffix,
    sha256_of,
    written_aside,
)
from ensemble_kit.networks.loading import member_prefix
from ensemble_kit.networks.onnx_model import OnnxModel
from ensemble_kit.networks.running import measure
from ensemble_kit.serving.measuring import measure_serving
from ensemble_kit.serving.metadata import proof_property, properties_of, read_metadata
from ensemble_kit.serving.model_card import CARD, write_card
from ensemble_kit.serving.onnx_file import (
    StoredTensor,
    Weight,
    add_properties,
    read_tensors,
    write_beside,
    write_onnx,
)
from ensemble_kit.serving.signature import inputs_of
from ensemble_kit.serving.triton import (
    TritonConfig,
    lacks_repository,
    refuse_repository,
    write_repository,
)
from ensemble_kit.store.blocks import SCALE, SCALE_TYPE
from ensemble_kit.store.dtypes import types_of_onnx_weights
from ensemble_kit.store.provenance import (
    FileMetadata,
    FusedMetadata,
    OnnxMetadata,
    ProofMetadata,
    ShippedGapMetadata,
)
from ensemble_kit.store.selection_file import SelectionMetadata, read_selection
from ensemble_kit.store.size_limit import refuse_size
from ensemble_kit.store.tensor_files import TensorFile, open_tensors
from ensemble_kit.wording import counted

LARGEST_FILE = 2**31 - 1  # protobuf's limit for a message
PROOF_BYTES = 1024  # reserved for the proof, which is added to a file after it has passed
REPORT_IT = "Report this as a bug in ensemble-kit; nothing was written."


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file that has passed its proofs.

    Attributes:
        path: The file.
        num_bytes: The size of all files that are needed to run it.
        max_size: The size limit, in bytes.
        repeats: The number of draws that it averages.
        proof: The measurements that it passed.
        card: The model card; None where another ``README.md`` was left unchanged.
    """

    path: Path
    num_bytes: int
    max_size: int
    repeats: int
    proof: ProofMetadata
    card: Path | None


class _Limit(NamedTuple):
    """The size limit of an export, and what its message needs.

    Attributes:
        max_size: Maximum size of all files needed to run, in bytes.
        fused_bytes: The size of the fused file.
        selection: The selection of its members, if it is still there.
        largest_file: The size limit of the model's own file, in bytes.
    """

    max_size: int
    fused_bytes: int
    selection: SelectionMetadata | None
    largest_file: int = LARGEST_FILE

    def refuse(self, aside: Path, output: Path, metadata: OnnxMetadata) -> int:
        """Return the bytes of all files needed to run a model, or raise if there are too many."""
        num_bytes = sum(path.stat().st_size for path in [aside, *metadata.files(output)[1:]])
        unproved = PROOF_BYTES if metadata.proof is None else 0
        refuse_size(
            "ONNX",
            num_bytes,
            self.max_size,
            members=metadata.members,
            selection=self.selection,
            overhead=max(0, num_bytes + unproved - self.fused_bytes),
        )
        if aside.stat().st_size > self.largest_file:
            raise ExportError(
                f"{output} would have {num_bytes:,} bytes; ONNX Runtime reads at most "
                f"{self.largest_file:,} from one file.",
                hint="Export with --low-memory, or fuse again with --dtype int8 or --dtype int4.",
            )
        return num_bytes


def export_onnx(
    fused: AnyPath,
    output: AnyPath,
    *,
    repeats: int = REPEATS,
    draw_source: DrawSource = DRAW_SOURCE,
    input_type: InputType | None = None,
    opset: Opset | None = None,
    low_memory: bool = False,
    triton: AnyPath | None = None,
    triton_config: TritonConfig = TritonConfig(),  # noqa: B008 - frozen
    max_size: int = MAX_SIZE,
    records: Records | None = None,
    max_gap_loss: float = MAX_GAP_LOSS,
    measures: bool = False,
    force: bool = False,
) -> ExportedFile:
    """Write a fused file as one ONNX model, and prove it equal before it is kept.

    Inputs are ``(B, T, D)`` for each modality and ``num_frames`` ``(B,)`` int64; B and T are free.
    Outputs are ``probabilities`` ``(B, C)``, and ``labels`` and ``confidences`` ``(B, k)``, the k
    most probable classes. Members that sample at random do so ``repeats`` times; the others run
    once. Weights pass through memory one at a time, and one member at a time is run in PyTorch. A
    model card, ``README.md``, is written beside the file.

    Args:
        fused: A fused file.
        output: The file to write.
        repeats: R, draws whose probabilities are averaged.
        draw_source: Where their uniform numbers come from. ``fixed``: a table in the file,
            different for each member, so that the same input gives the same output in any batch.
            ``random``: new numbers in each run. ``input``: ``(B, R, N)`` for each member, inputs
            of the graph; R is free unless a pooling takes repeats one by one, as gated BoF does.
        input_type: The type of every modality's input: ``uint8`` as records store it, dequantised
            in the graph, or ``float32``; None takes the schema's.
        opset: The version of ONNX's operators, for a runtime that knows no later one. None takes
            20, or 21 where a member has matrices in blocks, or what a foreign member needs. In 20,
            blocks are stored in as many bytes, and converted to float32 once, at opening.
        low_memory: Whether weights go into a second file beside it, which is memory-mapped.
        triton: The folder in which to write a model repository for NVIDIA Triton.
        triton_config: How Triton serves it.
        max_size: Maximum size of all files that are needed to run it, in bytes.
        records: Validation records. If the file computes from packed numbers, GAP is measured on
            them as the file is run, and with the same weights in float32.
        max_gap_loss: How far the first GAP may be below the second.
        measures: Whether opening the file and tagging a video are timed in a new process, for the
            model card.
        force: Whether existing files may be replaced. A ``README.md`` is replaced only if it is a
            model card.

    Raises:
        CheckpointError: ``fused`` is missing, damaged, changed since or of another kind.
        SizeLimitError: The file is larger than ``max_size``.
        ExportError: The file fails onnx's checker, stores a weight in another type, differs
            from PyTorch, or loses more than ``max_gap_loss``; or a foreign member needs a later
            ``opset``.
        PredictionsError: The records are not of the members' modalities or vocabulary.
        OutputError: ``output``, or a file of ``triton``, exists and ``force`` is False, or
            ``output`` has another suffix than ``.onnx``.
    """
    fused, output = Path(fused), Path(output)
    triton = None if triton is None else Path(triton)
    # this command may have been stopped between the model and what comes after it
    unfinished = None if force else _unfinished(output, triton)
    is_unfinished = unfinished is not None
    refuse_overwrite(output, force=force or is_unfinished)
    require_suffix(output, ".onnx")
    if triton is not None:
        refuse_repository(output, triton, force=force, keep_same=is_unfinished)
    with ExitStack() as stack:
        file = stack.enter_context(open_tensors(fused))
        fused_metadata, fused_sha256 = file.metadata_as(FusedMetadata), file.sha256()
        file.refuse_changed(fused_metadata.content_sha256)
        beside = _path_beside(output, fused_sha256)
        stack.enter_context(removed_on_failure(output, beside))
        with written_aside(output, force=force, keep_same=is_unfinished) as aside:
            types = _input_types(fused_metadata, input_type)
            graph = build_graph(
                file,
                fused_metadata,
                repeats=repeats,
                draw_source=draw_source,
                input_types=[*types.values()],
                opset=opset,
            )
            _check_graph(graph, output)
            metadata = _describe(fused_metadata, fused_sha256, graph, repeats, draw_source, types)
            if unfinished is not None and not _is_alike(unfinished, metadata):
                refuse_overwrite(output, force=False)  # before the work
            references = None
            if low_memory:
                references, metadata = _write_beside(beside, metadata, graph.weights)
            limit = _Limit(max_size, fused.stat().st_size, _selection_of(fused, fused_metadata))
            fits = partial(limit.refuse, aside, output)
            written, proof = _write_proved(aside, graph, references, metadata, file, fits, output)
            if records is not None and metadata.is_packed:
                gap = _measure(aside, records, fused_metadata.top_k, max_gap_loss, output)
                proof = proof.model_copy(update={"gap": gap})
            add_properties(aside, proof_property(proof), written)
            metadata = metadata.model_copy(update={"proof": proof})
            num_bytes = fits(metadata)
        if triton is not None:
            write_repository(
                output, metadata, triton, triton_config, force=force, keep_same=is_unfinished
            )
        served = measure_serving(output, inputs_of(metadata)[0].example[0]) if measures else None
        card = write_card(output, metadata, None, force=force, served=served)
    _drop_stale(output, metadata)
    return ExportedFile(output, num_bytes, max_size, repeats, proof, card)


def _write_proved(
    aside: Path,
    graph: Graph,
    references: list[bytes] | None,
    metadata: OnnxMetadata,
    file: TensorFile,
    fits: Callable[[OnnxMetadata], int],
    output: Path,
) -> tuple["hashlib._Hash", ProofMetadata]:
    """Write the model and compare it with the fused file.

    A model that draws in each run is proved with its draws as further outputs, and written again
    without them.

    Returns:
        The hash of its content, and the measurements.
    """
    shown = graph.showing_draws() if metadata.draw_source == "random" else graph
    written = _write(aside, shown, references, metadata)
    fits(metadata)
    tensors = read_tensors(aside)
    _check_weights(tensors, metadata, output)
    proof = _prove(aside, metadata, counts_of(tensors, metadata), file, output)
    if shown is not graph:
        written = _write(aside, graph, references, metadata)
        fits(metadata)
    return written, proof


def _unfinished(output: Path, triton: Path | None) -> OnnxMetadata | None:
    """Return the metadata of an export that lacks a file which is written after its model."""
    lacks_card = not exists(output.with_name(CARD))
    if not lacks_card and (triton is None or not lacks_repository(output, triton)):
        return None
    try:
        return read_metadata(output) if isfile(output) else None
    except EnsembleKitError:  # another tool wrote it, or it is damaged
        return None


def _is_alike(held: OnnxMetadata, metadata: OnnxMetadata) -> bool:
    """Return whether a file may be what an export of this description has left."""
    unknown = {"proof": None, "weights_file": None}
    return held.model_copy(update=unknown) == metadata.model_copy(update=unknown)


def _selection_of(fused: Path, metadata: FusedMetadata) -> SelectionMetadata | None:
    """Return the selection that a file was fused from, if it is still there and unchanged."""
    if metadata.selection is None:
        return None
    path = fused.parent / metadata.selection.path
    if not isfile(path) or sha256_of(path) != metadata.selection.sha256:
        return None
    return read_selection(path)


def _describe(
    fused: FusedMetadata,
    fused_sha256: str,
    graph: Graph,
    repeats: int,
    draw_source: DrawSource,
    input_types: dict[str, InputType],
) -> OnnxMetadata:
    """Return the metadata of a file that holds its own weights and is not proved yet."""
    return OnnxMetadata(
        kit_version=__version__,
        members=fused.members,
        data_schema=fused.data_schema,
        label_names=fused.data_schema.names,
        input_types=input_types,
        draw_source=draw_source,
        repeats=repeats,
        repeats_are_free=graph.repeats_are_free,
        draws=graph.draws,
        top_k=top_k_of(fused),
        opset=graph.opset,
        weights_file=None,
        fused_sha256=fused_sha256,
        validation=fused.validation,
    )


def _input_types(fused: FusedMetadata, asked: InputType | None) -> dict[str, InputType]:
    """Return the type of each modality's input."""
    return {
        modality.name: asked or modality.value_type for modality in fused.data_schema.modalities
    }


def _path_beside(output: Path, fused_sha256: str) -> Path:
    """Return a name for a file of weights that no other export's have, unless they are the same."""
    return output.with_name(f"{output.name}.{fused_sha256[:12]}.data")


def _write_beside(
    path: Path, metadata: OnnxMetadata, weights: Sequence[Weight]
) -> tuple[list[bytes], OnnxMetadata]:
    """Write weights into a second file.

    Returns:
        The references to them for the model's file, and its metadata, which names the second file.
    """
    with written_aside(path, force=True) as aside:
        references = write_beside(aside, weights, location=path.name)
    weights_file = FileMetadata.of(path, path.parent)
    return references, metadata.model_copy(update={"weights_file": weights_file})


def _drop_stale(output: Path, metadata: OnnxMetadata) -> None:
    """Remove second files of weights that earlier exports to this path wrote."""
    needed = metadata.files(output)
    for path in output.parent.glob(f"{glob.escape(output.name)}.{'[0-9a-f]' * 12}.data"):
        if path not in needed:
            path.unlink()


def _write(
    aside: Path,
    graph: Graph,
    references: list[bytes] | None,
    metadata: OnnxMetadata,
) -> "hashlib._Hash":
    """Write the model, and return the hash of its content."""
    properties = properties_of(metadata)
    return write_onnx(aside, *graph.parts(), graph.weights, properties, references=references)


def _check_graph(graph: Graph, output: Path) -> None:
    """Run onnx's checker on the graph; of the weights it sees only types and shapes."""
    try:
        onnx.checker.check_model(graph.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{output} fails onnx's checker: {error}.",
            hint=REPORT_IT,
        ) from error


def _check_weights(tensors: Sequence[StoredTensor], metadata: OnnxMetadata, output: Path) -> None:
    """Check the type of every stored weight: a Cast computed too early would double the file."""
    dtypes = {member_prefix(member.name): member.dtype for member in metadata.members}
    for tensor in tensors:
        dtype = dtypes.get(f"{tensor.name.partition('.')[0]}.")
        if dtype is None:
            continue
        wanted = [SCALE_TYPE.onnx]
        if not tensor.name.endswith(SCALE):
            wanted = types_of_onnx_weights(dtype, metadata.opset)
        if tensor.type_name not in wanted:
            raise ExportError(
                f"{output}: {tensor.name} is stored as {tensor.type_name}, not "
                f"{' or '.join(wanted)}.",
                hint=REPORT_IT,
            )


def _prove(
    path: Path, metadata: OnnxMetadata, counts: Mapping[str, int], file: TensorFile, output: Path
) -> ProofMetadata:
    """Compare the file with PyTorch, and return the measurements."""
    try:
        parity = compare(path, metadata, counts, file)
    except ProviderError as error:
        reason = str(error.__cause__ or error.problem).rstrip(".")
        raise ExportError(
            f"{output}: ONNX Runtime cannot open it: {reason}.", hint=REPORT_IT
        ) from error
    worst = parity.exact
    if not worst.is_allowed:
        raise ExportError(
            f"{output}: ONNX Runtime's probabilities differ by {worst.size:.2g} from PyTorch's on "
            f"{counted(worst.videos, 'video')} of {counted(worst.frames, 'frame')}; the tolerance "
            f"is {TOLERANCE:.0e}.",
            hint=REPORT_IT,
        )
    return ProofMetadata(
        exact_difference=worst.size,
        shipped_difference=None if parity.shipped is None else parity.shipped.size,
        shares=parity.shares,
        gap=None,
    )


def _measure(
    path: Path, records: Records, k: int, max_gap_loss: float, output: Path
) -> ShippedGapMetadata:
    """Measure GAP as the file is run and with its weights in float32.

    Raises:
        ExportError: The first is lower by more than ``max_gap_loss``.
    """
    gaps = {}
    for way in get_args(Computes):
        model = OnnxModel(path, repeats=None, device="cpu", computes=way)
        check_fits(model.schema, records.schema, path=output)
        metrics = measure(model.probabilities, records, k=k)
        gaps[way] = metrics.gap
    if gaps["float32"] - gaps["packed"] > max_gap_loss:
        raise ExportError(
            f"{output}: computing from packed numbers lowers GAP@{k} by "
            f"{gaps['float32'] - gaps['packed']:.4f}, from {gaps['float32']:.4f} to "
            f"{gaps['packed']:.4f} on {counted(metrics.videos, 'video')}; the limit is "
            f"{max_gap_loss:g}.",
            hint="Fuse with another --dtype, or raise --max-gap-loss.",
        )
    return ShippedGapMetadata(
        exact=gaps["float32"], shipped=gaps["packed"], k=k, videos=metrics.videos
    )
