"""Videos of any lengths as padded batches, which is what an exported file takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ensemble_kit.serving.inputs import check_modalities, check_port

Array = NDArray[Any]
Ports = Mapping[str, onnxruntime.NodeArg]
BATCH_BYTES = 2**25  # of padded frames: about 97 videos of 300 frames, 1,152 features and uint8


def padded(
    ports: Ports, frames: Mapping[str, Sequence[Array]]
) -> tuple[dict[str, Array], NDArray[np.int64]]:
    """Return videos side by side, padded with zeros, and their numbers of frames.

    Args:
        ports: The file's inputs by name.
        frames: B arrays ``(T, D)`` for each of the file's modalities; T may differ from video to
            video.

    Returns:
        ``(B, T, D)`` for each modality, where T is that of the longest video, 1 at least; and
        ``(B,)``.

    Raises:
        ValueError: There is no video; a type, a number of dimensions or a width is not the file's;
            or modalities have other numbers of videos, or of one video's frames.
    """
    arrays: dict[str, list[Array]] = {}
    for name, videos in frames.items():
        if not videos:
            raise ValueError(f"frames[{name!r}] holds 0 videos; at least 1 is needed")
        first = next(iter(frames))
        if len(videos) != len(frames[first]):
            raise ValueError(
                f"frames[{name!r}] has {len(videos)} videos, but frames[{first!r}] has "
                f"{len(frames[first])}"
            )
        arrays[name] = []
    for index in range(len(frames[first])):
        video = checked_video(
            {
                f"frames[{name!r}][{index}]": (name, videos[index])
                for name, videos in frames.items()
            },
            ports,
        )
        for name, values in video.items():
            arrays[name].append(values)
    lengths = np.array([len(values) for values in arrays[first]], np.int64)
    return {name: _side_by_side(videos, lengths) for name, videos in arrays.items()}, lengths


def batches(
    ports: Ports, videos: Iterable[Mapping[str, Array]], max_bytes: int
) -> Iterator[dict[str, list[Array]]]:
    """Yield videos in their order, as many at a time as fit a bound when they are padded.

    Args:
        ports: The file's inputs by name.
        videos: ``(T, D)`` for each modality of each video; T may differ from video to video.
        max_bytes: Maximum size of a batch's padded frames, in bytes. A video that is larger is a
            batch by itself.

    Raises:
        ValueError: As ``padded`` raises it, with the number of the video; or a modality is missing
            or is none of the file's.
    """
    waiting: list[dict[str, Array]] = []
    longest = 0
    for index, frames in enumerate(videos):
        check_modalities(f"videos[{index}]", frames, ports)
        video = checked_video(
            {f"videos[{index}][{name!r}]": (name, values) for name, values in frames.items()}, ports
        )
        length = len(next(iter(video.values())))
        frame_bytes = sum(values.shape[1] * values.itemsize for values in video.values())
        if waiting and (len(waiting) + 1) * max(longest, length) * frame_bytes > max_bytes:
            yield _by_modality(waiting)
            waiting, longest = [], 0
        waiting.append(video)
        longest = max(longest, length)
    if waiting:
        yield _by_modality(waiting)


def _by_modality(videos: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
    return {name: [video[name] for video in videos] for name in videos[0]}


def checked_video(given: Mapping[str, tuple[str, Array]], ports: Ports) -> dict[str, Array]:
    """Return one video's frames by modality.

    Args:
        given: A modality and its frames ``(T, D)``, by what a message calls them.
        ports: The file's inputs by name.

    Raises:
        ValueError: A type, a number of dimensions or a width is not the file's, or modalities have
            other numbers of frames.
    """
    video: dict[str, Array] = {}
    lengths: dict[str, int] = {}
    for what, (name, values) in given.items():
        try:
            frames = np.asarray(values)
        except ValueError as error:  # a list of lists of several lengths
            raise ValueError(f"{what} is no array of frames: {error}") from error
        check_port(what, frames, ports[name], is_one_video=True)
        lengths[what] = len(frames)
        first = next(iter(lengths))
        if lengths[what] != lengths[first]:
            raise ValueError(f"{what} has {lengths[what]} frames, but {first} has {lengths[first]}")
        video[name] = frames
    return video


def _side_by_side(videos: Sequence[Array], lengths: NDArray[np.int64]) -> Array:
    batch = np.zeros((len(videos), max(1, int(lengths.max())), videos[0].shape[1]), videos[0].dtype)
    for row, frames in zip(batch, videos, strict=True):
        row[: len(frames)] = frames
    return batch
