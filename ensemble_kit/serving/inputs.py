"""Checks of what an exported ensemble is given, before ONNX Runtime sees it.

ONNX Runtime's own checks come too late: recurrent operators end the process on a batch of no
videos, and a ``num_frames`` of one number is broadcast to all videos without a word.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ensemble_kit.draws import draws_name
from ensemble_kit.errors import ProviderError
from ensemble_kit.wording import counted

NUM_FRAMES = "num_frames"
DRAWS = draws_name("")  # the prefix of the inputs that are draws
Array = NDArray[Any]
FLOAT_WORDS = {"float": "float32", "double": "float64"}


def checked_feed(
    ports: Mapping[str, onnxruntime.NodeArg],
    frames: Mapping[str, Array],
    num_frames: Array,
    draws: Mapping[str, Array],
    *,
    first: int = 0,
) -> dict[str, Array]:
    """Return the value of each input of a file, all of them checked.

    Args:
        ports: The file's inputs by name.
        frames: ``(B, T, D)`` for each modality.
        num_frames: ``(B,)``, integers from 0 to T.
        draws: ``(B, R, N)`` for each input of draws, by the input's name.
        first: The number of the batch's first video, where it is one of several batches.

    Raises:
        ValueError: An input is missing or is none of the file's; B or T is 0; a type, a number of
            dimensions or a size is not the file's, or not the same for all inputs; a number of
            frames is not from 0 to T; a frame holds NaN or infinity; a draw is not in [0, 1).
    """
    check_modalities("frames", frames, ports)
    drawn = {name for name in ports if name.startswith(DRAWS)}
    if set(draws) != drawn:
        given, needed = (
            sorted(name.removeprefix(DRAWS) for name in each) for each in (draws, drawn)
        )
        raise ValueError(f"draws has {given}; the file's draws are {needed}")
    feed = {name: np.asarray(values) for name, values in frames.items()}
    sizes: tuple[int, ...] | None = None
    for name, values in feed.items():
        check_port(f"frames[{name!r}]", values, ports[name])
        for size, noun in zip(values.shape, ("videos", "frames"), strict=False):
            if size < 1:
                raise ValueError(f"frames[{name!r}] holds 0 {noun}; at least 1 is needed")
        sizes = sizes or values.shape[:2]
        if values.shape[:2] != sizes:
            raise ValueError(
                f"frames[{name!r}] has {values.shape[0]} videos of {values.shape[1]} frames, "
                f"but another modality has {sizes[0]} of {sizes[1]}"
            )
    assert sizes is not None
    counts = _checked_counts(num_frames, *sizes)
    for name, values in feed.items():
        if values.dtype.kind == "f":
            _check_finite(name, values, counts, first)
    tables = {name: _checked_draws(name, draws[name], ports[name], sizes[0]) for name in drawn}
    return {**feed, NUM_FRAMES: counts, **tables}


def run_session(
    session: onnxruntime.InferenceSession,
    outputs: tuple[str, ...],
    feed: Mapping[str, Array],
    *,
    name: str,
) -> list[Any]:
    """Run a file in a session and return its outputs.

    Raises:
        ProviderError: ONNX Runtime cannot run it, as where a foreign member has a table of fewer
            positions than a video has frames, or where there is too little memory.
    """
    try:
        found: list[Any] = session.run(list(outputs), dict(feed))
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ProviderError(
            f"ONNX Runtime cannot run {name} on {counted(len(feed[NUM_FRAMES]), 'video')}: "
            f"{' '.join(str(error).split()).rstrip('.')}.",
            hint="Tag fewer videos at a time, and none longer than the records that its members "
            "were trained or imported with.",
        ) from error
    return found


def check_modalities(
    what: str, frames: Mapping[str, Any], ports: Mapping[str, onnxruntime.NodeArg]
) -> None:
    """Raise ``ValueError`` unless frames are given for each modality of a file and for no other."""
    if not isinstance(frames, Mapping):
        raise ValueError(f"{what} is {type(frames).__name__}; it must be frames by modality")
    expected = {name for name in ports if name != NUM_FRAMES and not name.startswith(DRAWS)}
    if set(frames) != expected:
        raise ValueError(f"{what} has {sorted(frames)}; the file's inputs are {sorted(expected)}")


def check_port(
    what: str, values: Array, port: onnxruntime.NodeArg, *, is_one_video: bool = False
) -> None:
    """Raise ``ValueError`` unless an array has the type and the shape of an input.

    Args:
        what: What the message calls the array.
        values: The array; that of one video lacks the input's first dimension.
        port: The input.
        is_one_video: Whether it is that of one video.
    """
    shape = port.shape[1:] if is_one_video else port.shape
    word = port.type.removeprefix("tensor(").removesuffix(")")
    dtype = FLOAT_WORDS.get(word, word)
    if str(values.dtype) != dtype:
        raise ValueError(f"{what} is {values.dtype}; the file takes {dtype}")
    fits = len(values.shape) == len(shape) and all(
        not isinstance(needed, int) or size == needed
        for size, needed in zip(values.shape, shape, strict=True)
    )
    if not fits:
        needed = ", ".join(str(size) for size in shape)
        raise ValueError(f"{what} has shape {values.shape}; the file takes ({needed})")


def _checked_counts(num_frames: Array, videos: int, length: int) -> NDArray[np.int64]:
    counts = np.asarray(num_frames)
    if counts.dtype.kind not in "iu":
        raise ValueError(f"num_frames is {counts.dtype}; it must be integers")
    if counts.shape != (videos,):
        raise ValueError(
            f"num_frames has shape {counts.shape}; for {counted(videos, 'video')} it must be "
            f"({videos},)"
        )
    wrong = np.flatnonzero((counts < 0) | (counts > length))
    if wrong.size:
        raise ValueError(
            f"num_frames[{wrong[0]}] is {counts[wrong[0]]}; it must be from 0 to {length}, the "
            "frames of the batch"
        )
    return counts.astype(np.int64)


def _check_finite(name: str, values: Array, counts: NDArray[np.int64], first: int) -> None:
    """Raise unless all frames are finite; padding may hold anything.

    A sum is finite only if every number is, and costs less memory than a test of each.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
    for video, count in enumerate(counts):
        wrong = np.flatnonzero(~np.isfinite(values[video, :count]).all(axis=-1))
        if wrong.size:
            raise ValueError(
                f"frames[{name!r}] of video {first + video} holds NaN or infinity in frame "
                f"{wrong[0]}"
            )


def _checked_draws(name: str, values: Array, port: onnxruntime.NodeArg, videos: int) -> Array:
    draws = np.asarray(values)
    what = f"draws[{name.removeprefix(DRAWS)!r}]"
    check_port(what, draws, port)
    if draws.shape[0] != videos:
        raise ValueError(f"{what} is for {counted(draws.shape[0], 'video')}; there are {videos}")
    if draws.shape[1] < 1:
        raise ValueError(f"{what} holds 0 repeats; at least 1 is needed")
    if not bool(((draws >= 0) & (draws < 1)).all()):
        raise ValueError(f"{what} holds numbers that are not in [0, 1)")
    return draws
