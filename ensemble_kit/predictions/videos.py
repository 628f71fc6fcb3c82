"""The same videos in several files: their ids, their order and their labels."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import EnsembleKitError, PredictionsError, shown
from ensemble_kit.wording import counted


def dataset_sha256(ids: Sequence[str], labels: LabelLists) -> str:
    """Return the SHA-256 of video ids and labels in order: what selections compare."""
    digest = hashlib.sha256("\n".join(ids).encode())
    for part in labels:
        digest.update(b"\n" + part.astype("<i8").tobytes())
    return digest.hexdigest()


def aligned(
    ids: Sequence[str],
    path: Path,
    *,
    to: Sequence[str],
    of: Path,
    hint: str = "Make both files from the same videos; their order may differ.",
) -> NDArray[np.int64]:
    """Return where each video of another file is in this one.

    Args:
        ids: This file's videos, each once.
        path: This file, for the message.
        to: The other file's videos, each once.
        of: The other file, for the message.
        hint: What the message says to do.

    Returns:
        ``(N,)``: ``ids[order[i]] == to[i]``.

    Raises:
        PredictionsError: A video is in one of them only.
    """
    place = {video: index for index, video in enumerate(ids)}
    missing = next((video for video in to if video not in place), None)
    lacking, having = path, of
    if missing is None and len(ids) > len(to):
        missing = next(iter(place.keys() - set(to)))
        lacking, having = of, path
    if missing is not None:
        raise PredictionsError(f"{lacking} lacks video {missing!r}, which {having} has.", hint=hint)
    return np.array([place[video] for video in to], np.int64)


def taken(labels: LabelLists, order: NDArray[np.int64]) -> LabelLists:
    """Return the labels of some videos, in the order given."""
    counts = np.diff(labels.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    shifts = np.repeat(labels.offsets[order] - offsets[:-1], counts)
    return LabelLists(offsets, labels.classes[np.arange(offsets[-1]) + shifts])


def joined(lists: Sequence[LabelLists]) -> LabelLists:
    """Return the labels of the videos of several files, one file after the other."""
    counts = [np.zeros(1, np.int64), *(np.diff(each.offsets) for each in lists)]
    classes = [np.empty(0, np.int64), *(each.classes for each in lists)]
    return LabelLists(np.cumsum(np.concatenate(counts)), np.concatenate(classes))


def are_label_lists(labels: LabelLists, num_videos: int, num_classes: int) -> bool:
    """Return whether two arrays from a file are label lists of some videos and classes.

    Offsets that fall, or classes outside of the vocabulary, would be read as labels of other
    videos or end in an error of NumPy's.
    """
    offsets, classes = labels
    if offsets.ndim != 1 or classes.ndim != 1 or len(offsets) != num_videos + 1:
        return False
    if offsets[0] != 0 or offsets[-1] != len(classes) or (np.diff(offsets) < 0).any():
        return False
    if classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
        return False
    rises = np.diff(classes) > 0
    starts = offsets[1:-1]  # where another video begins, a class may be any
    rises[starts[(starts > 0) & (starts < len(classes))] - 1] = True
    return bool(rises.all())


class IdCheck:
    """Refuses ids that come twice, while they come; it keeps eight bytes of each.

    Args:
        path: The file that the ids are in, or will be in.
        forbidden: Characters that it cannot keep.
    """

    def __init__(self, path: Path, *, forbidden: str) -> None:
        self._path = path
        self._forbidden = frozenset(forbidden)
        self._hashes = array("q")

    def add(self, ids: Sequence[str]) -> None:
        """Take the next videos.

        Raises:
            PredictionsError: An id has a character that the file cannot keep.
        """
        for video in ids:
            if not _can_be_kept(video, self._forbidden):
                raise self._refused(video, "has a character that the file cannot keep")
        self._hashes.extend(map(hash, ids))

    def finish(self, ids: Iterable[str]) -> None:
        """Refuse an id that came twice.

        Args:
            ids: All of them again, looked at only where two hashes are the same.

        Raises:
            PredictionsError: There is one.
        """
        hashes = np.array(self._hashes, np.int64)
        hashes.sort()
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: set[str] = set()
        for video in ids if suspects else ():
            if video in seen:
                raise self._refused(video, "appears twice")
            if hash(video) in suspects:
                seen.add(video)

    def _refused(self, video: str, problem: str) -> PredictionsError:
        return PredictionsError(
            f"{self._path}: video id {shown(video)} {problem}.",
            hint="Give every record its own id, without line ends, in characters of Unicode.",
        )


def refuse_ids(ids: Sequence[str], path: Path, *, forbidden: str) -> None:
    """Raise if an id appears twice, or has a character that a file cannot keep.

    Args:
        ids: The videos.
        path: The file that they are in, or will be in.
        forbidden: Characters that it cannot keep.

    Raises:
        PredictionsError: There is such an id.
    """
    check = IdCheck(path, forbidden=forbidden)
    check.add(ids)
    check.finish(ids)


def _can_be_kept(video: str, forbidden: frozenset[str]) -> bool:
    if not forbidden.isdisjoint(video):
        return False
    try:
        video.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def held_out(ids: Sequence[str], fraction: float) -> NDArray[np.bool_]:
    """Return which videos are held out: those whose id's SHA-256 is in the lowest share.

    The same id falls on the same side whatever else is in the file, so that candidates which are
    added later are judged on the same videos. A random draw would need a seed and the same order.

    Args:
        ids: N video ids.
        fraction: From 0, for none, to 1.
    """
    limit = int(fraction * 2**64)
    return np.array(
        [int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") < limit for id_ in ids],
        np.bool_,
    )


def labelled_parts(
    ids: Sequence[str],
    labels: LabelLists,
    fraction: float,
    *,
    purposes: tuple[str, str],
    refusal: Callable[[str], EnsembleKitError],
) -> list[NDArray[np.bool_]]:
    """Return which videos are not held out, and which are; both have labels.

    Args:
        ids: N video ids.
        labels: Their labels.
        fraction: The share that is held out, see ``held_out``.
        purposes: What each part is for, for the message, such as ``to fit on``.
        refusal: Makes the error from ``leaves 1 video to fit on, without any label.``.

    Raises:
        EnsembleKitError: What ``refusal`` makes, where a part has no label.
    """
    is_held_out = held_out(ids, fraction)
    has_labels = np.diff(labels.offsets) > 0
    parts = [~is_held_out, is_held_out]
    for part, purpose in zip(parts, purposes, strict=True):
        if not has_labels[part].any():
            videos = counted(int(np.count_nonzero(part)), "video")
            raise refusal(f"leaves {videos} {purpose}, without any label.")
    return parts
