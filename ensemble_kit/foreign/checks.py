"""What an imported model must be before it is kept. Imports ``ensemble`` and ``foreign``."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ensemble_kit.errors import ForeignModelError
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.networks.foreign import ForeignModel, GraphInput, opset_of
from ensemble_kit.serving.opening import open_session

TOLERANCE = 1e-5  # float32 in another order of sums, over thousands of terms
PADDING_TOLERANCE = 1e-4  # a graph that reads padding is further off than any order of sums
SIZES = ((1, 1), (3, 7), (2, 11))  # videos and frames of the batches that are compared
DIMENSIONS = {
    "frames": "(videos, frames, features)",
    "num_frames": "(videos,)",
    "is_frame": "(videos, frames)",
}


def check_inputs(imported: ForeignModel, path: Path) -> None:
    """Raise ``ForeignModelError`` unless each input can take what it is to be given."""
    for given in imported.inputs:
        name, holds = given.record.name, given.record.holds
        shown = f"({', '.join(str(size or '?') for size in given.sizes)})"
        if given.rank not in _ranks(given, imported):
            raise ForeignModelError(
                f"{path}: the input {name} is {shown}; {holds} are {DIMENSIONS[holds]}.",
                hint="Map another input, or export the model with such a one.",
            )
        if given.sizes and given.sizes[0] is not None:
            raise ForeignModelError(
                f"{path}: the input {name} is {shown}, for {given.sizes[0]} videos at a time and "
                "no other number.",
                hint="Export the model with a free number of videos.",
            )
        if holds == "frames":
            _check_frames(given, imported, path, shown)


def _ranks(given: GraphInput, imported: ForeignModel) -> tuple[int, ...]:
    """Return how many dimensions an input may have."""
    if given.record.holds == "frames":  # a record of one mean vector has one frame
        return (2, 3) if imported.schema.level == "video" else (3,)
    return (1, 2) if given.record.holds == "num_frames" else (2,)


def _check_frames(given: GraphInput, imported: ForeignModel, path: Path, shown: str) -> None:
    name, modalities = given.record.name, given.record.modalities
    width = sum(imported.schema.widths[modality] for modality in modalities)
    if given.sizes and given.sizes[-1] not in (None, width):
        raise ForeignModelError(
            f"{path}: the input {name} is {shown}, but {'+'.join(modalities)} has {width} features "
            "in a frame.",
            hint="Map the modalities that it was trained on, in their order.",
        )
    form = imported.mapping.frames
    if form != "raw" and not given.dtype.is_floating_point:
        raise ForeignModelError(
            f"{path}: the input {name} holds {str(given.dtype).removeprefix('torch.')}, but "
            f"{form} frames are fractions.",
            hint="Use --frames raw.",
        )


def prove(imported: ForeignModel, path: Path, output: str | None) -> float:
    """Run a model beside the original, and on videos alone; return the largest difference.

    Args:
        imported: The model, with its weights.
        path: The original file.
        output: The original's output; None where it has one only.

    Raises:
        ForeignModelError: ONNX Runtime cannot run it on batches and lengths of all sizes, or what
            comes out is not ``(B, C)`` probabilities, is not the original's, or depends on padding.
    """
    original = _Original(path, output or imported.graph.graph.output[0].name)
    worst = 0.0
    for videos, length in SIZES:
        frames, num_frames = example_frames(imported.schema, videos, length)
        if (videos, length) == SIZES[-1]:
            num_frames[-1] = 0
        with torch.inference_mode():
            prepared = prepare_frames(frames, num_frames)
            expected = imported.activate(original.run(imported.feed(prepared), videos, length))
            original.check(expected, (videos, imported.schema.num_classes))
            found = imported.classify(prepared)
            alone = [
                imported(
                    {name: values[[row], : max(1, count)] for name, values in frames.items()},
                    num_frames[[row]],
                )
                for row, count in enumerate(num_frames.tolist())
            ]
        difference = float((expected - found).abs().max())
        if not difference <= TOLERANCE:
            opset = opset_of(imported.graph)
            raise ForeignModelError(
                f"{path}: in opset {opset}, its probabilities differ by {difference:.2g} from "
                f"those of the file on {videos} videos of {length} frames; {TOLERANCE:.0e} may be.",
                hint=f"Export the model again in opset {opset}.",
            )
        change = float((torch.cat(alone) - found).abs().max())
        if not change <= PADDING_TOLERANCE:
            raise ForeignModelError(
                f"{path}: the probabilities of a video change by {change:.2g} when padding follows "
                "its frames, or other videos lie beside it.",
                hint="Map what tells frames from padding, with --num-frames or --is-frame.",
            )
        worst = max(worst, difference)
    return worst


class _Original:
    """The file as its framework wrote it, run by ONNX Runtime."""

    def __init__(self, path: Path, output: str) -> None:
        self.path, self.output = path, output
        self._session = open_session(
            path,
            name=str(path),
            hint="Export the model again, for an opset that ONNX Runtime reads.",
        )

    def run(self, feed: Mapping[str, Tensor], videos: int, length: int) -> Tensor:
        """Return the output."""
        arrays = {name: values.numpy() for name, values in feed.items()}
        for value in self._session.get_inputs():
            if value.name not in arrays:  # the output does not depend on it; some value it must get
                free = [videos, length, *[1] * len(value.shape)]
                shape = [
                    size if isinstance(size, int) else other
                    for size, other in zip(value.shape, free, strict=False)
                ]
                word = value.type.removeprefix("tensor(").removesuffix(")")
                arrays[value.name] = np.zeros(
                    shape, {"float": "float32", "double": "float64"}.get(word, word)
                )
        try:
            (found,) = self._session.run([self.output], arrays)
        except Exception as error:
            raise ForeignModelError(
                f"{self.path}: ONNX Runtime cannot run it on {videos} videos of {length} frames: "
                f"{str(error).rstrip('.')}.",
                hint="Export the model with a free number of videos and of frames.",
            ) from error
        return torch.from_numpy(found)

    def check(self, probabilities: Tensor, shape: tuple[int, int]) -> None:
        """Raise ``ForeignModelError`` unless these are probabilities of such a shape."""
        found = tuple(probabilities.shape)
        if found != shape:
            raise ForeignModelError(
                f"{self.path}: its output {self.output} is {found} for {shape[0]} videos and "
                f"{shape[1]} classes; {shape} was expected.",
                hint="Name the right output with --probabilities, or the right records.",
            )
        low, high = float(probabilities.min()), float(probabilities.max())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise ForeignModelError(
                f"{self.path}: its output {self.output} goes from {low:.3g} to {high:.3g}, which "
                "are no probabilities.",
                hint="Use --activation sigmoid or --activation softmax, or name another output "
                "with --probabilities.",
            )
