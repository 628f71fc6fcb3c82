"""Run an exported ensemble.

No torch, no records: this is all that a server needs beside the ONNX file.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from ensemble_kit.choices import DEVICE, Computes, Device
from ensemble_kit.draws import draw_numbers, draws_name
from ensemble_kit.errors import ExportError, ProviderError
from ensemble_kit.serving.inputs import checked_feed, run_session
from ensemble_kit.serving.onnx_file import read_properties
from ensemble_kit.serving.opening import open_session
from ensemble_kit.store.blocks import FORMATS

METADATA_PREFIX = "ensemble_kit."
# Settings of a session: how packed products are summed, and whether there are to be none
ACCURACY_LEVEL, EXACT, FAST = "session.qdq_matmulnbits_accuracy_level", "1", "4"
NO_PACKED_PRODUCTS = "session.disable_quant_qdq"
OUTPUTS = ("probabilities", "labels", "confidences")


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
        low_memory: Whether weights stay in memory as they are stored, mapped from their own file
            where they have one, and are converted in each run. That opens faster and takes half of
            the memory, and each run takes longer. Matrices in blocks stay as they are stored in
            any case, and the few numbers beside them are converted once. None: as the file was
            exported.
        keep_memory: Whether a run's memory is kept for the next, up to the most that any has
            needed. Otherwise it is given back: with ``low_memory`` hardly any stays, and runs of
            few videos take twice as long.
        computes: ``packed`` computes products from the matrices in blocks that a file in int8 or
            int4 has; ``float32`` converts them once, while the file is opened, which takes up to
            eight times the memory. None takes ``packed`` where the file has blocks: it was the
            faster at every batch size measured, up to 128 videos, on a processor with VNNI.
            Without, measure both.
        is_exact: Whether packed products are summed in float32. Otherwise their inputs are rounded
            to 8 bits, in blocks too, which is several times as fast.
        profile: What the name of a file begins with to which ONNX Runtime writes a profile of all
            runs when ``session.end_profiling()`` is called.

    Attributes:
        computes: What it took: ``packed`` or ``float32``.
        provider: The execution provider that the session really got.
        metadata: What the file says of itself: members, label names, hashes, repeats.
        inputs: The names of all inputs.
        session: The session of ONNX Runtime.

    Raises:
        ProviderError: The file cannot be opened, was not exported by ensemble-kit, or would not run
            on the device that was asked for.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        device: Device = DEVICE,
        low_memory: bool | None = None,
        keep_memory: bool = True,
        computes: Computes | None = None,
        is_exact: bool = False,
        profile: Path | None = None,
    ) -> None:
        properties = _properties(Path(path))
        if low_memory is None:
            low_memory = properties.get("weights_file", "null") != "null"
        has_blocks = properties.get("dtype") in FORMATS
        self.computes = "packed" if has_blocks and computes != "float32" else "float32"
        options = onnxruntime.SessionOptions()
        if self.computes == "packed":
            options.add_session_config_entry(ACCURACY_LEVEL, EXACT if is_exact else FAST)
        else:
            options.add_session_config_entry(NO_PACKED_PRODUCTS, "1")
        options.enable_cpu_mem_arena = keep_memory
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        # Batches come in any shape, and a plan of memory is kept for each: half a file's size more
        # at three shapes, and no faster.
        options.enable_mem_pattern = False
        self._name = str(path)
        self.session = open_session(
            path,
            device=device,
            name=str(path),
            hint="Export the file again, or copy it again from where it is whole.",
            options=options,
            is_folding=has_blocks or not low_memory,
        )
        self.provider: str = self.session.get_providers()[0]
        self.metadata = _without_prefix(self.session.get_modelmeta().custom_metadata_map)
        if "data_schema" not in self.metadata:
            raise no_metadata(path)
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self._draws = {  # the member whose numbers an input is, and the shape (batch, R, N)
            value.name: (value.name.removeprefix(draws_name("")), value.shape)
            for value in self.session.get_inputs()
            if value.name.startswith(draws_name(""))
        }

    def run(
        self,
        frames: Mapping[str, np.ndarray[Any, Any]],
        num_frames: np.ndarray[Any, Any],
        *,
        repeats: int | None = None,
        draws: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Tags:
        """Tag B videos.

        Args:
            frames: ``(B, T, D)`` for each modality, in the type the file was exported for: uint8
                as stored in records, or float32.
            num_frames: ``(B,)``, integers; frames from there on are padding.
            repeats: R, how many draws to average; None: as many as it was exported with. Only a
                file whose draws are an input can change it.
            draws: For such a file ``(B, R, N)`` uniform numbers in [0, 1) for each member that
                draws; None takes the first R rows of the tables that other files hold.

        Raises:
            ValueError: An input is missing, unknown, empty, or of another type, shape or range
                than the file takes (see ``serving.inputs``), or the file's draws are not an input,
                or not as many as were asked for.
            ProviderError: ONNX Runtime cannot run the file on these videos.
        """
        if (repeats is not None or draws) and not self._draws:
            raise ValueError("the file's draws are not an input; repeats and draws cannot be given")
        if repeats is not None and repeats < 1:
            raise ValueError(f"repeats is {repeats}; it must be at least 1")
        ports = {value.name: value for value in self.session.get_inputs()}
        drawn = self._drawn(np.size(num_frames), repeats, draws)
        feed = checked_feed(ports, frames, num_frames, drawn)
        return Tags(*run_session(self.session, OUTPUTS, feed, name=self._name))

    def _drawn(
        self,
        batch_size: int,
        repeats: int | None,
        draws: Mapping[str, np.ndarray[Any, Any]] | None,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the inputs that are draws."""
        if draws is not None:
            return {draws_name(member): values for member, values in draws.items()}
        count = repeats or int(self.metadata["repeats"])
        feed = {}
        for name, (member, shape) in self._draws.items():
            if isinstance(shape[1], int) and shape[1] != count:
                raise ValueError(f"{name} has {shape[1]} repeats, which cannot be changed")
            table = draw_numbers(member, repeats=count, num_frames=shape[2])
            feed[name] = np.broadcast_to(table, (batch_size, *table.shape))
        return feed


def _properties(path: Path) -> dict[str, str]:
    """Return what a file says of itself, before it is opened."""
    with suppress(ExportError):  # which ONNX Runtime will put in its own words
        return _without_prefix(read_properties(path))
    return {}


def _without_prefix(properties: Mapping[str, str]) -> dict[str, str]:
    return {
        key.removeprefix(METADATA_PREFIX): value
        for key, value in properties.items()
        if key.startswith(METADATA_PREFIX)
    }


def no_metadata(path: Path | str) -> ProviderError:
    """Return the error for an ONNX file that another tool wrote."""
    return ProviderError(
        f"{path} has no metadata of ensemble-kit.",
        hint="Name a file that `ensemble-kit export-onnx` wrote.",
    )
