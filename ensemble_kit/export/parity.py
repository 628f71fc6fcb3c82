"""Whether an ONNX file computes what its fused file does. Imports ``loading`` and ``runtime``."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemble_kit.data.schema import Schema
from ensemble_kit.draws import draws_name
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.networks.loading import load_fused_member
from ensemble_kit.serving.session import OUTPUTS, OnnxEnsemble
from ensemble_kit.store.provenance import FusedMetadata, OnnxMetadata
from ensemble_kit.store.tensor_files import TensorFile

TOLERANCE = 1e-5  # float32 in another order of sums, over thousands of terms
SIZES = ((1, 1), (3, 7), (2, 11))  # videos and frames of the batches that are compared
Draws = Mapping[str, Tensor]


class Difference(NamedTuple):
    """The largest difference of any probability, and the batch that it was found on."""

    size: float
    videos: int
    frames: int

    @property
    def is_allowed(self) -> bool:
        """Whether it is what another order of sums may bring; NaN never is."""
        return self.size <= TOLERANCE


def largest_difference(path: Path, record: OnnxMetadata, file: TensorFile) -> Difference:
    """Compare ONNX Runtime with PyTorch on batches of several sizes and lengths.

    Only one of the two is in memory at a time.

    Args:
        path: The ONNX file. Its draws are a table in it or an input, or else it must have them
            among its outputs.
        record: What it says of itself.
        file: The fused file that it was exported from; one member at a time is loaded.

    Raises:
        ProviderError: ONNX Runtime cannot open the file.
    """
    schema = served_schema(record)
    batches = [example_frames(schema, *size) for size in SIZES]
    # no float32 copy of every weight, nor room for one
    ensemble = OnnxEnsemble(path, low_memory=True, keep_memory=False)
    found, drawn = zip(*[_run(ensemble, record, *batch) for batch in batches], strict=True)
    del ensemble
    expected = _expected(file, batches, drawn)
    differences = [
        Difference(float(np.abs(rows - probabilities.numpy()).max()), *size)
        for size, rows, probabilities in zip(SIZES, found, expected, strict=True)
    ]
    return max(differences, key=lambda each: (np.isnan(each.size), each.size))


def served_schema(record: OnnxMetadata) -> Schema:
    """Return the schema of a file with the value types of its inputs."""
    modalities = tuple(
        modality.model_copy(update={"value_type": record.input_types[modality.name]})
        for modality in record.data_schema.modalities
    )
    return record.data_schema.model_copy(update={"modalities": modalities})


def _run(
    ensemble: OnnxEnsemble, record: OnnxMetadata, frames: Mapping[str, Tensor], num_frames: Tensor
) -> tuple[np.ndarray, Draws]:
    """Return ONNX Runtime's probabilities, and the draws of each member that they are of."""
    arrays = {name: values.numpy() for name, values in frames.items()}
    if record.sampling != "random":
        draws = {
            member: draw_table(member, repeats=record.repeats, num_frames=count)
            for member, count in record.draws.items()
        }
        return ensemble.run(arrays, num_frames.numpy()).probabilities, draws
    names = [OUTPUTS[0], *map(draws_name, record.draws)]
    feed = {**arrays, "num_frames": num_frames.numpy()}
    probabilities, *numbers = ensemble.session.run(names, feed)
    return probabilities, dict(zip(record.draws, map(torch.from_numpy, numbers), strict=True))


def _expected(
    file: TensorFile,
    batches: list[tuple[dict[str, Tensor], Tensor]],
    drawn: tuple[Draws, ...],
) -> list[Tensor]:
    """Return PyTorch's probabilities for each batch; one member at a time is in memory."""
    record = file.metadata_as(FusedMetadata)
    mixed = [torch.zeros(()) for _ in batches]
    with torch.inference_mode():
        for member in record.members:
            model = load_fused_member(file, member, record.data_schema)
            for index, (batch, draws) in enumerate(zip(batches, drawn, strict=True)):
                share = model(*batch, draws.get(member.name))
                mixed[index] = mixed[index] + member.coefficient * share
    return mixed
