"""The proof that a foreign model computes what its file does, of each video alone."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import ForeignModelError
from ensemble_kit.foreign.onnx_source import Foreign
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.networks.foreign import ForeignModel, opset_of
from ensemble_kit.networks.foreign_session import run_foreign
from ensemble_kit.serving.inputs import FLOAT_WORDS
from ensemble_kit.serving.opening import open_session
from ensemble_kit.wording import counted

TOLERANCE = 1e-5  # float32 in another order of sums, over thousands of terms
PADDING_TOLERANCE = 1e-4  # a graph that reads padding is further off than any order of sums
SHORT = ((1, 1), (3, 7), (2, 11))  # videos and frames of the first batches that are compared
EMPTY = SHORT[-1]  # the batch whose last video has no frames
BATCH_SIZE = 2  # videos of each longer batch
MAX_VIDEOS = 2_000  # whose lengths are looked at
FOLDER = "session.model_external_initializers_file_folder_path"


def lengths_of(records: Records) -> list[int]:
    """Return the fewest, the median and the most frames of the first videos of some records."""
    lengths = sorted(video.num_frames for video in islice(records.videos(), MAX_VIDEOS))
    return [lengths[0], lengths[len(lengths) // 2], lengths[-1]] if lengths else []


def sizes_of_proof(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the videos and frames of the batches that a model is proved on, short ones first."""
    longer = [length for length in sorted(set(lengths), reverse=True) if length > EMPTY[1]]
    return [*SHORT, *((BATCH_SIZE, length) for length in longer)]


def prove(model: ForeignModel, foreign: Foreign, path: Path, lengths: Sequence[int] = ()) -> float:
    """Run a model beside the original, and on videos alone; return the largest difference.

    Args:
        model: The model, with its weights.
        foreign: The original.
        path: The original file.
        lengths: Numbers of frames to compare them on, beside a few short ones.

    Raises:
        ForeignModelError: ONNX Runtime cannot run it on batches and lengths of all sizes, or the
            output is not ``(B, C)`` probabilities, is not the original's, or depends on padding or
            on the other videos of a batch.
        ProviderError: ONNX Runtime cannot open the original.
    """
    original = _Original(path, foreign)
    return max(_compare(model, original, *size) for size in sizes_of_proof(lengths))


def _compare(model: ForeignModel, original: "_Original", videos: int, length: int) -> float:
    frames, num_frames = example_frames(model.schema, videos, length)
    num_frames[0] = length
    if (videos, length) == EMPTY:
        num_frames[-1] = 0
    with torch.inference_mode():
        prepared = prepare_frames(frames, num_frames)
        expected = model.activate(original.run(model.feed(prepared), videos, length))
        original.check(expected, (videos, model.schema.num_classes), length)
        found = model.classify(prepared)
        difference = float((expected - found).abs().max())
        if not difference <= TOLERANCE:
            opset = opset_of(model.graph)
            raise ForeignModelError(
                f"{original.path}: in opset {opset}, its probabilities differ by {difference:.2g} "
                f"from those of the file on {counted(videos, 'video')} of "
                f"{counted(length, 'frame')}; the tolerance is {TOLERANCE:.0e}.",
                hint=f"Export the model again in opset {opset}.",
            )
        change = _change_alone(model, frames, num_frames, found)
    if change is not None:
        raise _depends(original.path, model, change)
    return difference


class _Change(NamedTuple):
    """How much a video's probabilities depend on what lies beside its frames."""

    size: float
    is_of_padding: bool


def _change_alone(
    model: ForeignModel, frames: Mapping[str, Tensor], num_frames: Tensor, together: Tensor
) -> _Change | None:
    """Compare each video's probabilities in a batch with those that it has alone."""
    for row, length in enumerate(num_frames.tolist()):

        def alone(stop: int | None, row: int = row) -> Tensor:
            video = {name: values[[row], :stop] for name, values in frames.items()}
            probabilities: Tensor = model(video, num_frames[[row]])
            return probabilities[0]

        size = float((alone(max(1, length)) - together[row]).abs().max())
        if not size <= PADDING_TOLERANCE:
            padded = float((alone(None) - together[row]).abs().max())
            return _Change(size, is_of_padding=padded <= PADDING_TOLERANCE)
    return None


def _depends(path: Path, model: ForeignModel, change: _Change) -> ForeignModelError:
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.graph.node):
        return ForeignModelError(
            f"{path}: the probabilities of a video change by {change.size:.2g} with what else is "
            "in its batch, because DynamicQuantizeLinear scales all of it together.",
            hint="Use a model that is not quantised dynamically; fuse can store it in int8.",
        )
    if change.is_of_padding:
        return ForeignModelError(
            f"{path}: the probabilities of a video change by {change.size:.2g} when padding "
            "follows its frames.",
            hint="Map what tells frames from padding, with --num-frames or --is-frame.",
        )
    return ForeignModelError(
        f"{path}: the probabilities of a video change by {change.size:.2g} when other videos are "
        "in its batch.",
        hint="Export the model in its evaluation mode, without operators that join videos.",
    )


class _Original:
    """The file as its framework wrote it, run by ONNX Runtime.

    It is opened from the bytes that were read, not by its name: the file may change meanwhile.
    """

    def __init__(self, path: Path, foreign: Foreign) -> None:
        self.path, self.output = path, foreign.output
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(FOLDER, str(foreign.folder))
        self._session = open_session(
            foreign.original,
            name=str(path),
            hint="Export the model again, for an opset that ONNX Runtime reads.",
            options=options,
        )
        try:
            self._inputs = {value.name: value for value in self._session.get_inputs()}
        except UnicodeDecodeError as error:
            raise ForeignModelError(
                f"{path}: the name of an input is not text in UTF-8.",
                hint="Export the model again from the framework that made it.",
            ) from error

    def run(self, feed: Mapping[str, Tensor], videos: int, length: int) -> Tensor:
        """Return the output."""
        unused = {
            name: _zeros(value, videos, length)
            for name, value in self._inputs.items()
            if name not in feed  # the output does not depend on it, but it needs some value
        }
        return run_foreign(
            self._session,
            {**feed, **unused},
            self.output,
            name=str(self.path),
            size=(videos, length),
            hint="Export the model with a free number of videos and of frames; if features come "
            "before frames in an input, use --input MODALITY=INPUT:channels-first."
            if length <= EMPTY[1]
            else f"Export the model for videos of {length} frames; it ran on {EMPTY[1]}.",
        )

    def check(self, probabilities: Tensor, shape: tuple[int, int], length: int) -> None:
        """Raise ``ForeignModelError`` unless these are probabilities of such a shape."""
        found = tuple(probabilities.shape)
        videos, classes = shape
        if found != shape:
            raise ForeignModelError(
                f"{self.path}: its output {self.output} has shape {found} for "
                f"{counted(videos, 'video')} of {counted(length, 'frame')} and {classes} classes; "
                f"it should have shape {shape}.",
                hint="Name the right output with --probabilities, or the right records.",
            )
        if probabilities.isnan().any():
            raise ForeignModelError(
                f"{self.path}: its output {self.output} holds NaN for "
                f"{counted(videos, 'video')} of {counted(length, 'frame')}.",
                hint="Give it frames in the form that it was trained on, with --frames, or export "
                "the model again.",
            )
        low, high = float(probabilities.min()), float(probabilities.max())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise ForeignModelError(
                f"{self.path}: its output {self.output} ranges from {low:.3g} to {high:.3g}; "
                "probabilities lie between 0 and 1.",
                hint="Use --activation sigmoid or --activation softmax, or name another output "
                "with --probabilities.",
            )


def _zeros(value: onnxruntime.NodeArg, videos: int, length: int) -> Tensor:
    """Return zeros for an input, with ``videos`` and ``length`` for its free dimensions."""
    free = [videos, length, *[1] * len(value.shape)]
    shape = [
        size if isinstance(size, int) else other
        for size, other in zip(value.shape, free, strict=False)
    ]
    word = value.type.removeprefix("tensor(").removesuffix(")")
    if word == "bfloat16":
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.from_numpy(np.zeros(shape, FLOAT_WORDS.get(word, word)))
