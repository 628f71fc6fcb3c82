"""An exported file as a model of batches of records."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble_kit.choices import Computes
from ensemble_kit.data.dataset import Batch
from ensemble_kit.data.schema import Modality
from ensemble_kit.errors import CheckpointError
from ensemble_kit.layers.frame_preparation import dequantise
from ensemble_kit.serving.metadata import metadata_of
from ensemble_kit.serving.session import OnnxEnsemble
from ensemble_kit.wording import counted


class OnnxModel:
    """An exported file, open on a device.

    Args:
        path: The file.
        repeats: R for test-time draws; None means as many as it was exported with.
        device: ``cpu`` or ``cuda``.
        computes: See ``OnnxEnsemble``.

    Attributes:
        schema: What records must hold. A float32 input takes records of bytes too.
        repeats: Draws whose probabilities are averaged.

    Raises:
        CheckpointError: The number of draws cannot be changed.
        ProviderError: ONNX Runtime cannot open the file on the device.
    """

    def __init__(
        self,
        path: Path,
        *,
        repeats: int | None,
        device: str,
        computes: Computes | None = None,
    ) -> None:
        self._ensemble = OnnxEnsemble(
            path, device="cuda" if device == "cuda" else "cpu", computes=computes
        )
        self._metadata = metadata = metadata_of(self._ensemble.metadata, path)
        if repeats not in {None, metadata.repeats} and not metadata.repeats_are_free:
            raise CheckpointError(
                f"{path} was exported for {counted(metadata.repeats, 'repeat')}; "
                "--repeats cannot change that.",
                hint="Leave --repeats out, or export the ensemble again with another --repeats.",
            )
        self.repeats = repeats or metadata.repeats
        modalities = tuple(self._as_read(modality) for modality in metadata.data_schema.modalities)
        self.schema = metadata.data_schema.model_copy(update={"modalities": modalities})

    def probabilities(self, batch: Batch) -> np.ndarray[Any, Any]:
        """Return the probability of every class, ``(B, C)`` float32, for a batch of records."""
        frames = {name: self._as_input(name, values) for name, values in batch.frames.items()}
        repeats = self.repeats if self._metadata.repeats_are_free else None
        return self._ensemble.run(frames, batch.num_frames, repeats=repeats).probabilities

    def _as_read(self, modality: Modality) -> Modality:
        takes_bytes = self._metadata.input_types[modality.name] == "uint8"
        return modality.model_copy(update={"value_type": "uint8"}) if takes_bytes else modality

    def _as_input(self, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return frames in the type of their input; a float32 input gets dequantised bytes."""
        if self._metadata.input_types[name] == "float32" and values.dtype == np.uint8:
            return dequantise(torch.from_numpy(values)).numpy()
        return values
