"""Export: a fused file as one ONNX model that averages repeated random frame samples."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

import onnx

from ensemble_kit._version import __version__
from ensemble_kit.choices import DRAW_SOURCE, MAX_SIZE, REPEATS, DrawSource, InputType
from ensemble_kit.errors import ExportError, ProviderError
from ensemble_kit.export.graph import Graph, build_graph, top_k_of
from ensemble_kit.export.parity import TOLERANCE, largest_difference
from ensemble_kit.files import refuse_overwrite, sha256_of, written_aside
from ensemble_kit.networks.loading import member_prefix
from ensemble_kit.networks.storage import SCALE
from ensemble_kit.serving.metadata import properties_of
from ensemble_kit.serving.model_card import write_card
from ensemble_kit.serving.onnx_file import (
    Weight,
    read_tensors,
    write_beside,
    write_onnx,
)
from ensemble_kit.serving.triton import refuse_repository, write_repository
from ensemble_kit.store.dtypes import types_of_weights
from ensemble_kit.store.provenance import FileMetadata, FusedMetadata, OnnxMetadata
from ensemble_kit.store.selection_file import SelectionMetadata, read_selection
from ensemble_kit.store.size_limit import refuse_size
from ensemble_kit.store.tensor_files import TensorFile, open_tensors

LARGEST_FILE = 2**31 - 1  # protobuf's limit of a message
REPORT_IT = "Report this as a fault of ensemble-kit; nothing was written."


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file that has passed its proofs.

    Attributes:
        path: Where it lies.
        num_bytes: What all files take that are needed to run it.
        max_size: The limit that they fit.
        repeats: Draws that it averages.
        worst_difference: The largest difference of any probability from PyTorch's.
        card: The model card; None where another ``README.md`` was left as it is.
    """

    path: Path
    num_bytes: int
    max_size: int
    repeats: int
    worst_difference: float
    card: Path | None


def export_onnx(
    fused: Path,
    output: Path,
    *,
    repeats: int = REPEATS,
    sampling: DrawSource = DRAW_SOURCE,
    input_type: InputType | None = None,
    low_memory: bool = False,
    triton: Path | None = None,
    max_size: int = MAX_SIZE,
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
        sampling: Where their uniform numbers come from. ``fixed``: a table in the file, different
            for each member, so that the same input gives the same output in any batch. ``random``:
            fresh ones in each run. ``input``: ``(B, R, N)`` for each member, inputs of the graph;
            R is free unless a pooling takes repeats one by one, as gated BoF does.
        input_type: Of every modality: ``uint8`` as records store it, dequantised in the graph, or
            ``float32``; None takes the schema's.
        low_memory: Whether weights lie in a file of their own beside it, to be mapped.
        triton: A folder to lay out as a model repository of NVIDIA Triton.
        max_size: The most bytes that all files needed to run may have.
        force: Whether existing files may be replaced; of a ``README.md`` only a model card is.

    Raises:
        CheckpointError: ``fused`` is missing, damaged or of another kind.
        SizeLimitError: The file is larger than ``max_size``.
        ExportError: The file fails onnx's checker, stores a weight in another type, or differs
            from PyTorch.
        OutputError: ``output``, or a file of ``triton``, exists and ``force`` is False.
    """
    refuse_overwrite(output, force=force)
    if triton is not None:
        refuse_repository(output, triton, force=force)
    with ExitStack() as stack:
        file = stack.enter_context(open_tensors(fused))
        aside = stack.enter_context(written_aside(output, force=force))
        fused_record = file.metadata_as(FusedMetadata)
        modalities = fused_record.data_schema.modalities
        types = {modality.name: input_type or modality.value_type for modality in modalities}
        graph = build_graph(
            file, fused_record, repeats=repeats, sampling=sampling, input_types=[*types.values()]
        )
        _check_graph(graph, output)
        record = _describe(fused_record, sha256_of(fused), graph, repeats, sampling, types)
        references = None
        if low_memory:  # a name that no other export's weights have, unless they are the same
            beside = output.with_name(f"{output.name}.{record.fused_sha256[:12]}.data")
            references, digest = stack.enter_context(_written_beside(beside, graph.weights))
            weights_file = FileMetadata(path=beside.name, sha256=digest)
            record = record.model_copy(update={"weights_file": weights_file})
        selection = _selection_of(fused, fused_record)
        shown = graph.showing_draws() if sampling == "random" else graph
        num_bytes = _write(aside, shown, references, record, max_size, selection, output)
        _check_weights(aside, record, output)
        worst = _prove(aside, record, file, output)
        if shown is not graph:
            num_bytes = _write(aside, graph, references, record, max_size, selection, output)
    _drop_stale(output, record)
    if triton is not None:
        write_repository(output, record, triton, force=force)
    card = write_card(output, record, force=force)
    return ExportedFile(output, num_bytes, max_size, repeats, worst, card)


def _selection_of(fused: Path, record: FusedMetadata) -> SelectionMetadata | None:
    """Return the selection that a file was fused from, if it still lies where it lay."""
    if record.selection is None:
        return None
    path = fused.parent / record.selection.path
    if not isfile(path) or sha256_of(path) != record.selection.sha256:
        return None
    return read_selection(path)


def _describe(
    fused: FusedMetadata,
    fused_sha256: str,
    graph: Graph,
    repeats: int,
    sampling: DrawSource,
    input_types: dict[str, InputType],
) -> OnnxMetadata:
    """Return what a file of one piece is to say of itself."""
    return OnnxMetadata(
        kit_version=__version__,
        dtype=fused.dtype,
        members=fused.members,
        data_schema=fused.data_schema,
        label_names=fused.data_schema.names,
        input_types=input_types,
        sampling=sampling,
        repeats=repeats,
        repeats_are_free=graph.repeats_are_free,
        draws=graph.draws,
        top_k=top_k_of(fused),
        weights_file=None,
        fused_sha256=fused_sha256,
        validation=fused.validation,
    )


@contextmanager
def _written_beside(path: Path, weights: Sequence[Weight]) -> Iterator[tuple[list[bytes], str]]:
    """Write weights into a file of their own, which goes again if the block fails.

    Yields:
        What the model's file refers to them by, and the SHA-256 of theirs.
    """
    was_there = path.exists()
    with written_aside(path, force=True) as aside:
        references = write_beside(aside, weights, location=path.name)
    try:
        yield references, sha256_of(path)
    except BaseException:
        if not was_there:
            path.unlink()
        raise


def _drop_stale(output: Path, record: OnnxMetadata) -> None:
    """Remove the weights of files that were in the output's place before."""
    needed = record.files(output)
    for path in output.parent.glob(f"{glob.escape(output.name)}.{'[0-9a-f]' * 12}.data"):
        if path not in needed:
            path.unlink()


def _write(
    aside: Path,
    graph: Graph,
    references: list[bytes] | None,
    record: OnnxMetadata,
    max_size: int,
    selection: SelectionMetadata | None,
    output: Path,
) -> int:
    """Write the model; return the bytes of all files needed to run it, or raise if too many."""
    properties = properties_of(record)
    write_onnx(aside, *graph.parts(), graph.weights, properties, references=references)
    num_bytes = sum(path.stat().st_size for path in [aside, *record.files(output)[1:]])
    refuse_size(
        "ONNX",
        num_bytes,
        max_size,
        selection=selection,
        dtype=record.dtype,
        overhead=num_bytes - sum(weight.num_bytes for weight in graph.weights),
    )
    if aside.stat().st_size > LARGEST_FILE:
        raise ExportError(
            f"{output} would have {num_bytes:,} bytes; ONNX Runtime reads at most "
            f"{LARGEST_FILE:,} from one file.",
            hint="Export with --low-memory, or fuse again with --dtype bf16 or --dtype int8.",
        )
    return num_bytes


def _check_graph(graph: Graph, output: Path) -> None:
    """Run onnx's checker on the graph; what it checks of weights is their types and shapes."""
    try:
        onnx.checker.check_model(graph.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{output} fails onnx's checker: {error}.",
            hint=REPORT_IT,
        ) from error


def _check_weights(path: Path, record: OnnxMetadata, output: Path) -> None:
    """Look at the type of every stored weight: a Cast computed too early would double the file."""
    prefixes = tuple(member_prefix(member.name) for member in record.members)
    for tensor in read_tensors(path):
        is_scale = tensor.name.endswith(SCALE)
        wanted = [each.onnx for each in types_of_weights("fp32" if is_scale else record.dtype)]
        if tensor.name.startswith(prefixes) and tensor.type_name not in wanted:
            raise ExportError(
                f"{output}: {tensor.name} is stored as {tensor.type_name}, not "
                f"{' or '.join(wanted)}.",
                hint=REPORT_IT,
            )


def _prove(path: Path, record: OnnxMetadata, file: TensorFile, output: Path) -> float:
    """Compare the file with PyTorch; return the largest difference found."""
    try:
        worst = largest_difference(path, record, file)
    except ProviderError as error:
        reason = str(error.__cause__ or error.problem).rstrip(".")
        raise ExportError(
            f"{output}: ONNX Runtime cannot open it: {reason}.", hint=REPORT_IT
        ) from error
    if not worst.is_allowed:
        raise ExportError(
            f"{output}: ONNX Runtime's probabilities differ by {worst.size:.2g} from PyTorch's on "
            f"{worst.videos} videos of {worst.frames} frames; at most {TOLERANCE:.0e} may be.",
            hint=REPORT_IT,
        )
    return worst.size
