"""Run an exported ensemble. Imports NumPy, ONNX Runtime and ``errors``: no torch, no records.

This is all that a server needs beside the ONNX file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime

from ensemble_kit.errors import ProviderError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
METADATA_PREFIX = "ensemble_kit."


class Tags(NamedTuple):
    """What an ensemble says of B videos.

    Attributes:
        probabilities: ``(B, C)``, float32 in [0, 1].
        labels: ``(B, k)``, int64: the k most probable classes, the most probable first.
        confidences: ``(B, k)``, float32: their probabilities.
    """

    probabilities: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    confidences: np.ndarray[Any, Any]


class OnnxEnsemble:
    """An exported ensemble in an ONNX Runtime session.

    Args:
        path: The ``.onnx`` file.
        device: ``cpu`` or ``cuda``. ONNX Runtime falls back to the CPU in silence where CUDA's
            libraries are missing; this class refuses that.

    Attributes:
        provider: The execution provider that the session really got.
        metadata: What the file says of itself: members, label names, hashes, repeats.

    Raises:
        ProviderError: The file cannot be opened, was not exported by ensemble-kit, or would not run
            on the device that was asked for.
    """

    def __init__(self, path: Path | str, *, device: Literal["cpu", "cuda"] = "cpu") -> None:
        wanted = PROVIDERS[device]
        if wanted not in onnxruntime.get_available_providers():
            raise _not_on(path, wanted, "this build of ONNX Runtime does not have it")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors come as exceptions; warnings are not the user's
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=[wanted])
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            raise ProviderError(
                f"ONNX Runtime cannot open {path}: {str(error).rstrip('.')}.",
                mend="Export the file again, or copy it again from where it is whole.",
            ) from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != wanted:
            raise _not_on(path, wanted, f"the session got {self.provider}")
        properties = self._session.get_modelmeta().custom_metadata_map
        self.metadata: Mapping[str, str] = {
            key.removeprefix(METADATA_PREFIX): value
            for key, value in properties.items()
            if key.startswith(METADATA_PREFIX)
        }
        if "data_schema" not in self.metadata:
            raise ProviderError(
                f"{path} carries no record of ensemble-kit.",
                mend="Name a file that `ensemble-kit export-onnx` wrote.",
            )
        self.inputs = tuple(value.name for value in self._session.get_inputs())

    def run(
        self, frames: Mapping[str, np.ndarray[Any, Any]], num_frames: np.ndarray[Any, Any]
    ) -> Tags:
        """Tag B videos.

        Args:
            frames: ``(B, T, D)`` for each modality, in the type the file was exported for: uint8
                as stored in records, or float32.
            num_frames: ``(B,)``, integers; frames from there on are padding.

        Raises:
            ValueError: A modality is missing, or is not one of the file's inputs.
        """
        expected = set(self.inputs) - {"num_frames"}
        if set(frames) != expected:
            raise ValueError(
                f"frames has {sorted(frames)}; the file's inputs are {sorted(expected)}"
            )
        feed = {**frames, "num_frames": np.asarray(num_frames, dtype=np.int64)}
        probabilities, labels, confidences = self._session.run(None, feed)
        return Tags(probabilities, labels, confidences)


def _not_on(path: Path | str, wanted: str, reason: str) -> ProviderError:
    return ProviderError(
        f"{path} would not run on {wanted}: {reason}.",
        mend="Install onnxruntime-gpu with CUDA 13 and cuDNN 9, or ask for the CPU.",
    )
