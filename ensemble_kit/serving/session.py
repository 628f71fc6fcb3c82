"""Run an exported ensemble.

It needs neither torch nor records: a server needs this module, what it imports, and the ONNX file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from ensemble_kit.choices import DEVICE, ON_HUB, OPSET, AnyPath, Computes, Device
from ensemble_kit.draws import draw_numbers, draws_name
from ensemble_kit.errors import ExportError, ProviderError
from ensemble_kit.serving.batches import BATCH_BYTES, batches, checked_video, padded
from ensemble_kit.serving.calibration import Calibration
from ensemble_kit.serving.inputs import check_modalities, checked_feed, run_session
from ensemble_kit.serving.mapping import FOLDER, mapped_model
from ensemble_kit.serving.opening import open_session
from ensemble_kit.serving.windows import windows
from ensemble_kit.store.blocks import FORMATS

METADATA_PREFIX = "ensemble_kit."
# Settings of a session: how packed products are summed, and whether products are packed at all
ACCURACY_LEVEL, EXACT, FAST = "session.qdq_matmulnbits_accuracy_level", "1", "4"
NO_PACKED_PRODUCTS = "session.disable_quant_qdq"
OUTPUTS = ("probabilities", "labels", "confidences")


class Tags(NamedTuple):
    """An ensemble's results for B videos.

    Attributes:
        probabilities: ``(B, C)``, float32 in [0, 1].
        labels: ``(B, k)``, int64: the k most probable classes, the most probable first.
        confidences: ``(B, k)``, float32: their probabilities.
    """

    probabilities: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    confidences: np.ndarray[Any, Any]


class Tag(NamedTuple):
    """A class that a video is given.

    Attributes:
        label: The class's name.
        class_index: Its place among the classes.
        confidence: Its calibrated probability.
    """

    label: str
    class_index: int
    confidence: float


class OnnxEnsemble:
    """An exported ensemble in an ONNX Runtime session.

    Args:
        path: The ``.onnx`` file, or its name on the Hugging Face Hub: ``hf:user/name``, with
            ``@revision`` to pin it (see ``serving.hub``).
        device: ``cpu`` or ``cuda``. ONNX Runtime silently falls back to the CPU where CUDA's
            libraries are missing; this class raises an error instead.
        low_memory: Whether weights stay in memory as they are stored, mapped from the second file
            if there is one, and are converted in each run. The file then opens faster and takes
            half the memory, but each run takes longer. Matrices in blocks always stay as they are
            stored, and the few other numbers are then converted once. None takes the setting that
            the file was exported with.
        keep_memory: Whether a run's memory is kept for the next run. Otherwise it is freed: with
            ``low_memory`` hardly any is held between runs, but runs of few videos take twice as
            long.
        computes: ``packed`` computes products from the matrices in blocks that a file in int8 or
            int4 has; ``float32`` converts them once, while the file is opened, which takes up to
            eight times the memory. None takes ``packed`` where the file has blocks: on a processor
            with VNNI it was faster at every measured batch size, up to 128 videos. On a processor
            without VNNI, measure both.
        is_exact: Whether packed products are summed in float32. Otherwise their inputs are rounded
            to 8 bits, in blocks too, which is several times as fast.
        profile: Prefix of the name of a file. ONNX Runtime writes a profile of all runs to it when
            ``session.end_profiling()`` is called.

    Attributes:
        computes: What products are computed from: ``packed`` or ``float32``.
        provider: The execution provider that the session really got.
        metadata: The file's metadata as text: members, label names, hashes, repeats.
        inputs: The names of all inputs.
        session: The session of ONNX Runtime.
        source: ``path``; of a file on the Hub, with the commit that it is of.

    Raises:
        HubError: The file cannot be had from the Hub.
        ProviderError: The file cannot be opened, was not exported by ensemble-kit, or would not run
            on the device that was asked for.
    """

    def __init__(
        self,
        path: AnyPath,
        *,
        device: Device = DEVICE,
        low_memory: bool | None = None,
        keep_memory: bool = True,
        computes: Computes | None = None,
        is_exact: bool = False,
        profile: Path | None = None,
    ) -> None:
        self.source = str(path)
        if self.source.startswith(ON_HUB):
            from ensemble_kit.serving.hub import fetch  # which a file on disk does without

            path, reference = fetch(str(path))
            self.source = str(reference)
        model, properties = _mapped(Path(path))
        if low_memory is None:
            low_memory = properties.get("weights_file", "null") != "null"
        has_blocks = _has_blocks(properties)
        is_packed = has_blocks and properties.get("opset") != str(OPSET)
        self.computes: Computes = "packed" if is_packed and computes != "float32" else "float32"
        options = _options(self.computes, is_exact, keep_memory, profile)
        self.session = _open(Path(path), model, device, options, has_blocks or not low_memory)
        self.provider: str = self.session.get_providers()[0]
        self.metadata = without_prefix(self.session.get_modelmeta().custom_metadata_map)
        if "data_schema" not in self.metadata:
            raise no_metadata(path)
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self._draws = {  # by input: the member that it is for, and its shape (batch, R, N)
            value.name: (value.name.removeprefix(draws_name("")), value.shape)
            for value in self.session.get_inputs()
            if value.name.startswith(draws_name(""))
        }

    def run(
        self,
        frames: Mapping[str, np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]],
        num_frames: np.ndarray[Any, Any] | None = None,
        *,
        repeats: int | None = None,
        draws: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Tags:
        """Tag B videos.

        Args:
            frames: For each modality ``(B, T, D)``, or a list of B arrays ``(T, D)`` of any
                lengths, in the type the file was exported for: uint8 as stored in records, or
                float32. Padding changes no result.
            num_frames: ``(B,)``, integers; frames from there on are padding. None with lists,
                whose arrays have their own lengths.
            repeats: R, how many draws to average; None takes the number that the file was exported
                with. Only a file whose draws are inputs accepts another number.
            draws: For such a file ``(B, R, N)`` uniform numbers in [0, 1) for each member that
                draws; None takes the first R rows of the tables that ``fixed`` files hold.

        Raises:
            ValueError: An input is missing, unknown, empty, or of another type, shape or range
                than the file takes (see ``serving.inputs``), or the file's draws are not an input,
                or not as many as were asked for.
            ProviderError: ONNX Runtime cannot run the file on these videos.
        """
        return self._run(frames, num_frames, repeats=repeats, draws=draws)

    def tags(
        self,
        frames: Mapping[str, np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]],
        num_frames: np.ndarray[Any, Any] | None = None,
        *,
        min_precision: float | None = None,
        repeats: int | None = None,
    ) -> list[list[Tag]]:
        """Return the classes that each video is given by a file that was calibrated.

        Args:
            frames: See ``run``.
            num_frames: See ``run``.
            min_precision: The precision of tags that was wished for, over 0 and at most 0.99: a
                class is given where its probability is over the class's threshold for that
                precision, or the next higher one that thresholds were made for. None takes each
                class's threshold with the best F1.
            repeats: See ``run``.

        Returns:
            The tags of each of the B videos, the most confident first; some may have none.

        Raises:
            ValueError: The file was not calibrated, ``min_precision`` is out of range, or as in
                ``run``.
            ProviderError: The file's calibration is damaged, or as in ``run``.
        """
        calibration = self.calibration
        if calibration is None:
            raise ValueError(
                f"{self.source} was not calibrated; `ensemble-kit calibrate` writes one that is"
            )
        thresholds = calibration.thresholds_for(min_precision)
        probabilities = self.run(frames, num_frames, repeats=repeats).probabilities
        confidences = calibration.calibrated(probabilities)
        names = json.loads(self.metadata["label_names"])
        return [
            sorted(
                (
                    Tag(names[place], int(place), float(row[place]))
                    for place in np.flatnonzero(is_tag)
                ),
                key=lambda tag: -tag.confidence,
            )
            for is_tag, row in zip(probabilities >= thresholds, confidences, strict=True)
        ]

    def run_windows(
        self,
        frames: Mapping[str, np.ndarray[Any, Any]],
        *,
        window: float,
        stride: float | None = None,
        repeats: int | None = None,
    ) -> Iterator[tuple[float, float, Tags]]:
        """Tag a video window by window, each as if it were a video.

        Args:
            frames: ``(T, D)`` for each modality of one video.
            window: The length of a window, in seconds; the file says how many frames are a second.
            stride: From the start of one window to the next, in seconds; None takes ``window``.
            repeats: See ``run``.

        Yields:
            Each window's first and last moment in seconds, and its ``Tags``, of one video.

        Raises:
            ValueError: The window or the stride is less than a frame, or as in ``run``.
            ProviderError: As in ``run``.
        """
        ports = {value.name: value for value in self.session.get_inputs()}
        check_modalities("frames", frames, ports)
        named = {f"frames[{name!r}]": (name, rows) for name, rows in frames.items()}
        video = checked_video(named, ports)
        a_second = float(json.loads(self.metadata["data_schema"]).get("frames_per_second", 1))
        places = windows(
            len(next(iter(video.values()))),
            length=window,
            stride=window if stride is None else stride,
            frames_per_second=a_second,
        )
        cut = ({name: rows[slice(*place)] for name, rows in video.items()} for place in places)
        remaining = iter(places)
        for tags in self.run_in_batches(cut, repeats=repeats):
            for row, place in zip(range(len(tags.labels)), remaining, strict=False):
                one = Tags(*(values[row : row + 1] for values in tags))
                yield place.start / a_second, place.stop / a_second, one

    @cached_property
    def calibration(self) -> Calibration | None:
        """What `ensemble-kit calibrate` added to the file; None where it did not.

        Raises:
            ProviderError: It is damaged.
        """
        return Calibration.of(self.metadata, self.source)

    def run_in_batches(
        self,
        videos: Iterable[Mapping[str, np.ndarray[Any, Any]]],
        *,
        max_bytes: int = BATCH_BYTES,
        repeats: int | None = None,
    ) -> Iterator[Tags]:
        """Tag videos as they come, in batches that a bound on memory cuts.

        Args:
            videos: ``(T, D)`` for each modality of each video, of any lengths.
            max_bytes: Maximum size of a batch's padded frames, in bytes. Running the file takes a
                multiple of it, which depends on the members. A larger video is run by itself.
            repeats: See ``run``.

        Yields:
            What the ensemble says of each batch: together of all videos, in their order.

        Raises:
            ValueError: See ``run``; it names the video by its number.
            ProviderError: ONNX Runtime cannot run the file on these videos.
        """
        ports = {value.name: value for value in self.session.get_inputs()}
        first = 0
        for frames in batches(ports, videos, max_bytes):
            tags = self._run(frames, None, repeats=repeats, draws=None, first=first)
            first += len(tags.labels)
            yield tags

    def _run(
        self,
        frames: Mapping[str, np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]],
        num_frames: np.ndarray[Any, Any] | None,
        *,
        repeats: int | None,
        draws: Mapping[str, np.ndarray[Any, Any]] | None,
        first: int = 0,
    ) -> Tags:
        """Run the file on one batch, whose first video has the number ``first``."""
        if (repeats is not None or draws) and not self._draws:
            raise ValueError("the file's draws are not an input; repeats and draws cannot be given")
        if repeats is not None and repeats < 1:
            raise ValueError(f"repeats is {repeats}; it must be at least 1")
        ports = {value.name: value for value in self.session.get_inputs()}
        batch, counts = _one_batch(ports, frames, num_frames)
        drawn = self._drawn(np.size(counts), repeats, draws)
        feed = checked_feed(ports, batch, counts, drawn, first=first)
        return Tags(*run_session(self.session, OUTPUTS, feed, name=self.source))

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


def _one_batch(
    ports: Mapping[str, onnxruntime.NodeArg],
    frames: Mapping[str, Any],
    num_frames: np.ndarray[Any, Any] | None,
) -> tuple[Mapping[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Return frames as one padded batch, and their numbers."""
    check_modalities("frames", frames, ports)
    are_lists = [isinstance(values, list | tuple) for values in frames.values()]
    if any(are_lists):
        if not all(are_lists):
            raise ValueError("frames has lists and arrays; give one of both for all modalities")
        if num_frames is not None:
            raise ValueError("num_frames is given; lists of videos have their own lengths")
        return padded(ports, frames)
    if num_frames is None:
        raise ValueError("num_frames is missing; a padded batch needs it")
    return frames, num_frames


def _options(
    computes: Computes, is_exact: bool, keep_memory: bool, profile: Path | None
) -> onnxruntime.SessionOptions:
    """Return a session's settings; see ``OnnxEnsemble`` for the arguments."""
    options = onnxruntime.SessionOptions()
    if computes == "packed":
        options.add_session_config_entry(ACCURACY_LEVEL, EXACT if is_exact else FAST)
    else:
        options.add_session_config_entry(NO_PACKED_PRODUCTS, "1")
    options.enable_cpu_mem_arena = keep_memory
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    # ONNX Runtime would keep a plan of memory for each shape of batch: after three shapes, that
    # took half the file's size more and was no faster.
    options.enable_mem_pattern = False
    return options


def _mapped(path: Path) -> tuple[bytes | None, dict[str, str]]:
    """Return a file's model with its weights mapped, and its metadata as text."""
    try:
        model = mapped_model(path.resolve())  # ONNX Runtime follows no link out of its folder
    except ExportError:
        return None, {}  # ONNX Runtime will put the problem in its own words
    return model.content, without_prefix(model.properties)


def _open(
    path: Path,
    model: bytes | None,
    device: Device,
    options: onnxruntime.SessionOptions,
    is_folding: bool,
) -> onnxruntime.InferenceSession:
    """Open a file with its weights mapped, or as ONNX Runtime opens any where that fails."""
    open_model = partial(
        open_session,
        device=device,
        name=str(path),
        hint="Export the file again, or copy it again from where it is whole.",
        options=options,
        is_folding=is_folding,
    )
    if model is not None:
        options.add_session_config_entry(FOLDER, str(path.resolve().parent))
        try:
            return open_model(model)
        except ProviderError as error:
            if error.__cause__ is None:  # opened, but not on the device
                raise
            # before 1.21 ONNX Runtime does not know the setting
    return open_model(path)


def _has_blocks(properties: Mapping[str, str]) -> bool:
    """Return whether some member has matrices in blocks, by the file's own metadata."""
    try:
        return any(member["dtype"] in FORMATS for member in json.loads(properties["members"]))
    except (KeyError, TypeError, ValueError):
        return False  # damaged; what reads the metadata strictly says so


def without_prefix(properties: Mapping[str, str]) -> dict[str, str]:
    """Return the kit's own properties of a model, by their names without its prefix."""
    return {
        key.removeprefix(METADATA_PREFIX): value
        for key, value in properties.items()
        if key.startswith(METADATA_PREFIX)
    }


def no_metadata(path: AnyPath) -> ProviderError:
    """Return the error for an ONNX file that another tool wrote."""
    return ProviderError(
        f"{path} has no metadata of ensemble-kit.",
        hint="Name a file that `ensemble-kit export-onnx` wrote.",
    )
