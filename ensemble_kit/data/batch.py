"""Videos side by side: a batch, and the one block of memory that its frames are written to."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.decode import Video
from ensemble_kit.data.frame_choice import Chosen
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import Schema

ALIGNMENT = 64  # bytes; every array starts on its own cache line
BLOCKS_KEPT = 2  # one for the batch that a loop has in hand, one for the next


@dataclass(frozen=True)
class Batch:
    """Some videos of a schema, as arrays.

    Attributes:
        ids: B video ids.
        frames: ``(B, T, D)`` for each modality's name, in the schema's value type; T is the
            longest video's, zeros fill the rest.
        num_frames: ``(B,)``, int64.
        labels: The classes of each video.
        frame_weights: ``(B, T)``, float32: how often each frame was drawn, 0 on padding, where
            frames were chosen while the records were read (see ``FrameChoice``); else None.
        epoch: The epoch of training that the batch's last video belongs to, counted from 0.
    """

    ids: tuple[str, ...]
    frames: Mapping[str, NDArray[Any]]
    num_frames: NDArray[np.int64]
    labels: LabelLists
    frame_weights: NDArray[np.float32] | None = None
    epoch: int = 0

    def copy(self) -> "Batch":
        """Return a batch whose frames lie in memory that it owns."""
        weights = self.frame_weights
        return replace(
            self,
            frames={name: values.copy() for name, values in self.frames.items()},
            frame_weights=None if weights is None else weights.copy(),
        )


class Contents(NamedTuple):
    """What a batch holds besides its frames."""

    ids: tuple[str, ...]
    num_frames: NDArray[np.int64]
    labels: LabelLists


class BatchLayout:
    """Where the frames of a batch lie in one block of memory.

    Args:
        schema: What the videos are of.
        num_videos: The most videos that the block takes.
        num_frames: The most frames that one of them has.
        is_weighted: Whether each frame has a weight.

    Attributes:
        num_bytes: The size of the block.
    """

    def __init__(
        self, schema: Schema, *, num_videos: int, num_frames: int, is_weighted: bool
    ) -> None:
        self.num_videos = num_videos
        self.num_frames = num_frames
        self._modalities = [modality.name for modality in schema.modalities]
        # Weights come after the modalities, one number a frame.
        shapes = [(np.dtype(m.value_type), m.width) for m in schema.modalities]
        shapes += [(np.dtype(np.float32), 1)] if is_weighted else []
        self._parts = []
        self.num_bytes = 0
        for dtype, width in shapes:
            self._parts.append((self.num_bytes, dtype, width))
            size = num_videos * num_frames * width * dtype.itemsize
            self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def arrays(
        self, memory: NDArray[np.uint8], *, num_videos: int, num_frames: int
    ) -> list[NDArray[Any]]:
        """Return ``(B, T, D)`` of each modality, and of the weights with D = 1, in a block."""
        found = []
        for start, dtype, width in self._parts:
            stop = start + num_videos * num_frames * width * dtype.itemsize
            values = memory[start:stop].view(dtype)
            found.append(values.reshape(num_videos, num_frames, width))
        return found

    def batch(self, memory: NDArray[np.uint8], contents: Contents, *, epoch: int = 0) -> Batch:
        """Return the batch that was written to a block."""
        ids, num_frames, labels = contents
        longest = int(num_frames.max(initial=0))
        arrays = self.arrays(memory, num_videos=len(ids), num_frames=longest)
        frames = dict(zip(self._modalities, arrays, strict=False))
        weights = arrays[-1][..., 0] if len(arrays) > len(frames) else None
        return Batch(ids, frames, num_frames, labels, weights, epoch)


class Collator:
    """Writes videos to a block, one after the other, each frame copied once.

    Args:
        layout: Where the frames lie.
        memory: The block; what is in it does not matter.
        num_frames: The frames that the longest video will probably have: a good guess saves
            moving the others. None takes the most that the layout has room for.
    """

    def __init__(
        self, layout: BatchLayout, memory: NDArray[np.uint8], *, num_frames: int | None = None
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._room = layout.num_frames if num_frames is None else num_frames
        self._rows = layout.arrays(memory, num_videos=layout.num_videos, num_frames=self._room)
        self._ids: list[str] = []
        self._num_frames: list[int] = []
        self._classes: list[NDArray[np.int64]] = [np.empty(0, np.int64)]

    def add(self, video: Video, chosen: Chosen | None = None) -> None:
        """Write one video: all its frames, or those chosen and their weights."""
        row = len(self._ids)
        num_frames = video.num_frames if chosen is None else len(chosen.rows)
        if num_frames > self._room:
            self._move(self._layout.num_frames)
        for rows, frames in zip(self._rows, video.frames.values(), strict=False):
            rows[row, :num_frames] = frames if chosen is None else frames[chosen.rows]
        if chosen is not None:
            self._rows[-1][row, :num_frames, 0] = chosen.weights
        self._ids.append(video.id)
        self._num_frames.append(num_frames)
        self._classes.append(video.classes)

    def add_all(
        self,
        ids: Sequence[str],
        classes: Sequence[NDArray[np.int64]],
        parts: Iterable[tuple[NDArray[np.int64], Sequence[NDArray[Any]]]],
    ) -> None:
        """Write all videos of a batch at once.

        Args:
            ids: Their ids.
            classes: The class indices of each.
            parts: Which videos have as many frames, and ``(n, T, D)`` of each modality.
        """
        num_frames = np.zeros(len(ids), np.int64)
        for rows, frames in parts:
            count = frames[0].shape[1]
            if count > self._room:
                self._move(self._layout.num_frames)
            for target, values in zip(self._rows, frames, strict=False):
                target[rows, :count] = values
            num_frames[rows] = count
        self._ids += ids
        self._num_frames += num_frames.tolist()
        self._classes += classes

    def are_finite(self) -> bool:
        """Return whether all numbers that were written are finite."""
        counts = self._num_frames
        for rows in self._rows:
            if rows.dtype.kind != "f":
                continue
            if len(set(counts)) == 1:
                written = [rows[: len(counts), : counts[0]]]
            else:
                written = [row[:count] for row, count in zip(rows, counts, strict=False)]
            if not all(np.isfinite(values).all() for values in written):
                return False
        return True

    def finish(self) -> Contents:
        """Close the gaps after videos that are shorter than expected, and fill with zeros."""
        num_frames = np.array(self._num_frames, np.int64)
        self._move(int(num_frames.max(initial=0)))
        for rows in self._rows:
            for number in np.flatnonzero(num_frames < self._room).tolist():
                rows[number, self._num_frames[number] :] = 0
        offsets = np.cumsum([len(classes) for classes in self._classes], dtype=np.int64)
        labels = LabelLists(offsets, np.concatenate(self._classes))
        return Contents(tuple(self._ids), num_frames, labels)

    def _move(self, room: int) -> None:
        """Give every video room for so many frames, more or fewer than so far."""
        moved = self._layout.arrays(
            self._memory, num_videos=self._layout.num_videos, num_frames=room
        )
        if room != self._room:
            # In an order in which none is written over one that is still to be moved.
            order = range(len(self._ids))[:: 1 if room < self._room else -1]
            for rows, targets in zip(self._rows, moved, strict=True):
                for row in order:
                    count = self._num_frames[row]
                    targets[row, :count] = rows[row, :count]
        self._rows, self._room = moved, room


class Memory:
    """Blocks of memory, each used again once nothing refers to the batch that lay in it.

    Fresh memory is cleared by the system page by page, which takes as long as copying into it.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[NDArray[np.uint8], weakref.ref[NDArray[np.uint8]]]] = []

    def lend(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return a block of at least so many bytes; what is in it does not matter."""
        free = (block for block, lent in self._blocks if lent() is None and len(block) >= num_bytes)
        block = next(free, None)
        if block is None:
            block = np.empty(num_bytes, np.uint8)
        lent = np.frombuffer(block.data, np.uint8)  # views refer to it, and not to the block itself
        others = [kept for kept in self._blocks if kept[0] is not block]
        self._blocks = [*others[1 - BLOCKS_KEPT :], (block, weakref.ref(lent))]
        return lent


def collate(videos: Sequence[Video], schema: Schema, memory: Memory | None = None) -> Batch:
    """Return videos as one batch, padded with zeros to the longest.

    Args:
        videos: At least one.
        schema: What they are of.
        memory: Lends the memory of the frames; None allocates memory for this batch.
    """
    layout = BatchLayout(
        schema,
        num_videos=len(videos),
        num_frames=max(video.num_frames for video in videos),
        is_weighted=False,
    )
    block = (memory or Memory()).lend(layout.num_bytes)
    collator = Collator(layout, block)
    for video in videos:
        collator.add(video)
    return layout.batch(block, collator.finish())
