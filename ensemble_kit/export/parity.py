"""Compare an exported ONNX file with the fused file that it was made from."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ensemble_kit.data.schema import Schema
from ensemble_kit.draws import draws_name
from ensemble_kit.export.shares import shares_of_run, shares_of_types
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.networks.ensemble import example_frames, longest_proof
from ensemble_kit.networks.loading import load_fused_member
from ensemble_kit.serving.session import OUTPUTS, OnnxEnsemble
from ensemble_kit.store.provenance import (
    FusedMetadata,
    OnnxMetadata,
    SharesMetadata,
    has_blocks,
)
from ensemble_kit.store.tensor_files import TensorFile

TOLERANCE = 1e-5  # for float32 sums of thousands of terms, added in another order
SHORT = ((1, 1), (3, 7), (2, 11))  # videos and frames of the batches that are compared
NUM_LONG = 2  # videos of one more batch, as long as any of the records' can be
Draws: TypeAlias = Mapping[str, Tensor]
Frames: TypeAlias = tuple[dict[str, Tensor], Tensor]  # the frames of each modality, and num_frames
Run: TypeAlias = tuple[np.ndarray[Any, Any], Draws]


class Difference(NamedTuple):
    """The largest difference of any probability, and the size of the batch that it is from."""

    size: float
    videos: int
    frames: int

    @property
    def is_allowed(self) -> bool:
        """Whether another order of sums explains the difference; NaN is never allowed."""
        return self.size <= TOLERANCE


class Parity(NamedTuple):
    """The result of a comparison with PyTorch.

    Attributes:
        exact: With products summed in float32.
        shipped: As ``OnnxEnsemble`` runs the file by default; None where that is the same.
        shares: How the stored numbers are used when the file is run.
    """

    exact: Difference
    shipped: Difference | None
    shares: SharesMetadata


def compare(
    path: Path, metadata: OnnxMetadata, counts: Mapping[str, int], file: TensorFile
) -> Parity:
    """Compare ONNX Runtime with PyTorch on batches of several sizes and lengths.

    Only one of the two is in memory at a time.

    Args:
        path: The ONNX file. If it draws in the graph, its draws must be among its outputs.
        metadata: The file's metadata.
        counts: The number of values in each of its weights, from ``counts_of``.
        file: The fused file that it was exported from; one member at a time is loaded.

    Raises:
        ProviderError: ONNX Runtime cannot open the file.
    """
    schema = served_schema(metadata)
    sizes = [*SHORT, (NUM_LONG, longest_proof(schema, metadata.members))]
    batches = [_batch(schema, *size) for size in sizes]
    # These settings keep no float32 copy of the weights, and no memory for one.
    ensemble = OnnxEnsemble(path, low_memory=True, keep_memory=False, is_exact=True)
    runs = [_run(ensemble, metadata, *batch) for batch in batches]
    del ensemble
    if metadata.is_packed:
        shipped, shares = _run_as_shipped(path, metadata, counts, batches)
        runs += shipped
    else:
        shares = shares_as_shipped(path, metadata, counts)
    times = len(runs) // len(batches)
    expected = _expected(file, batches * times, [draws for _, draws in runs])
    differences = [
        Difference(float(np.abs(rows - probabilities.numpy()).max()), *size)
        for size, (rows, _), probabilities in zip(sizes * times, runs, expected, strict=True)
    ]
    exact, others = differences[: len(batches)], differences[len(batches) :]
    return Parity(_largest(exact), _largest(others) if others else None, shares)


def _batch(schema: Schema, videos: int, length: int) -> Frames:
    frames, num_frames = example_frames(schema, videos, length)
    num_frames[0] = length
    return frames, num_frames


def shares_as_shipped(
    path: Path, metadata: OnnxMetadata, counts: Mapping[str, int]
) -> SharesMetadata:
    """Return how the stored numbers are used when a file is run.

    Args:
        path: The ONNX file.
        metadata: The file's metadata.
        counts: See ``compare``.

    Raises:
        ProviderError: ONNX Runtime cannot open the file.
    """
    if not has_blocks(metadata.members):
        return shares_of_types(metadata, counts)
    batch = example_frames(served_schema(metadata), *SHORT[0])
    with tempfile.TemporaryDirectory() as folder:
        ensemble = OnnxEnsemble(path, keep_memory=False, profile=Path(folder) / "run")
        arrays = {name: values.numpy() for name, values in batch[0].items()}
        ensemble.run(arrays, batch[1].numpy())
        return shares_of_run(Path(ensemble.session.end_profiling()), metadata, counts)


def _largest(differences: Sequence[Difference]) -> Difference:
    return max(differences, key=lambda each: (np.isnan(each.size), each.size))


def _run_as_shipped(
    path: Path, metadata: OnnxMetadata, counts: Mapping[str, int], batches: Sequence[Frames]
) -> tuple[list[Run], SharesMetadata]:
    """Run a file with the default settings of ``OnnxEnsemble``."""
    with tempfile.TemporaryDirectory() as folder:
        ensemble = OnnxEnsemble(path, keep_memory=False, profile=Path(folder) / "run")
        runs = [_run(ensemble, metadata, *batch) for batch in batches]
        return runs, shares_of_run(Path(ensemble.session.end_profiling()), metadata, counts)


def served_schema(metadata: OnnxMetadata) -> Schema:
    """Return a file's schema, with the value types that the file's inputs have."""
    modalities = tuple(
        modality.model_copy(update={"value_type": metadata.input_types[modality.name]})
        for modality in metadata.data_schema.modalities
    )
    return metadata.data_schema.model_copy(update={"modalities": modalities})


def _run(
    ensemble: OnnxEnsemble, metadata: OnnxMetadata, frames: Mapping[str, Tensor], num_frames: Tensor
) -> Run:
    """Return ONNX Runtime's probabilities, and the draws that each member used."""
    arrays = {name: values.numpy() for name, values in frames.items()}
    if metadata.draw_source != "random":
        draws = {
            member: draw_table(member, repeats=metadata.repeats, num_frames=count)
            for member, count in metadata.draws.items()
        }
        return ensemble.run(arrays, num_frames.numpy()).probabilities, draws
    names = [OUTPUTS[0], *map(draws_name, metadata.draws)]
    feed = {**arrays, "num_frames": num_frames.numpy()}
    probabilities, *numbers = ensemble.session.run(names, feed)
    return probabilities, dict(zip(metadata.draws, map(torch.from_numpy, numbers), strict=True))


def _expected(
    file: TensorFile,
    batches: Sequence[Frames],
    drawn: Sequence[Draws],
) -> list[Tensor]:
    """Return PyTorch's probabilities for each batch; one member at a time is in memory."""
    metadata = file.metadata_as(FusedMetadata)
    mixed = [torch.zeros(()) for _ in batches]
    with torch.inference_mode():
        for member in metadata.members:
            model = load_fused_member(file, member, metadata.data_schema)
            for index, (batch, draws) in enumerate(zip(batches, drawn, strict=True)):
                share = model(*batch, draws.get(member.name))
                mixed[index] = mixed[index] + member.coefficient * share
    return mixed
