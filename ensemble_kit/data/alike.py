"""Small records of a batch, decoded together where they are laid out alike.

A record of a few kilobytes takes Python longer to take apart than to copy. But the records of one
writer that have as many bytes mostly have the same keys, tags and lengths at the same places, and
only their values differ. So the first such record is decoded by ``decode``, and becomes a pattern:
the bytes that say where everything lies. Other records of its length are compared with the pattern,
many of them in one pass of NumPy, and where every byte of it is the same, ``decode`` would find the
same values at the same places, which are then taken from all of them at once. A record that differs
in any of these bytes is decoded by itself, and becomes a pattern in its turn.

What ``decode`` looks at in the values themselves is looked at too: labels here, and whether numbers
are finite where they have been copied. Wherever something is wrong or unusual, every record of the
batch is decoded by itself, so that errors are made in one place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ensemble_kit.data.decode import Layout
from ensemble_kit.data.fields import Features, split
from ensemble_kit.data.schema import Schema

SMALL_BYTES = 16 << 10  # of a record; a larger one takes longer to copy than to take apart
MOST_MISSES = 8  # batches in a row that held something unusual, after which no more are tried
PATTERNS_KEPT = 1024  # of a few hundred bytes each
ID_TAG, LABELS_TAG = 0x0A, 0x1A  # of a Feature's bytes_list and int64_list
LONGEST_LABEL = 4  # bytes of a varint; more are no class
HEADER = 4  # a Feature of fewer than 128 bytes: its tag and length, those of its one value


Groups: TypeAlias = Sequence[tuple[NDArray[np.int64], NDArray[np.uint8]]]


class Part(NamedTuple):
    """Videos of a batch that are laid out alike.

    Attributes:
        rows: ``(n,)``, int64: their places in the batch.
        frames: ``(n, T, D)`` of each modality, views of their records.
    """

    rows: NDArray[np.int64]
    frames: Sequence[NDArray[np.generic]]


class Videos(NamedTuple):
    """All videos of a batch.

    Attributes:
        ids: B ids.
        classes: The class indices of each, int64, sorted, each once.
        parts: Their frames.
    """

    ids: Sequence[str]
    classes: Sequence[NDArray[np.int64]]
    parts: Sequence[Part]


@dataclass(frozen=True, eq=False)
class _Pattern:
    """Where records have their values.

    Attributes:
        places: The bytes that must be the same, by their place in a record.
        expected: What they are.
        id: Where the id lies.
        labels: Where the labels lie, packed; None where the record has none.
        frames: Where the frames of each modality lie, headers included.
    """

    places: NDArray[np.int64]
    expected: NDArray[np.uint8]
    id: slice
    labels: slice | None
    frames: Sequence[slice]


class _Patterns:
    """The patterns of one length, against which records are compared all at once.

    Writers differ in the order of keys, so that records of a length have a few patterns each.
    """

    def __init__(self) -> None:
        self.patterns: list[_Pattern] = []
        self._places = np.empty(0, np.int64)  # of any pattern
        self._expected = np.empty((0, 0), np.uint8)  # by pattern and place
        self._is_free = np.empty((0, 0), np.bool_)  # where a pattern does not have a place

    def add(self, pattern: _Pattern) -> None:
        """Know one more pattern."""
        self.patterns.append(pattern)
        self._places = np.unique(np.concatenate([each.places for each in self.patterns]))
        shape = len(self.patterns), len(self._places)
        self._expected, self._is_free = np.zeros(shape, np.uint8), np.ones(shape, np.bool_)
        for number, each in enumerate(self.patterns):
            columns = np.searchsorted(self._places, each.places)
            self._expected[number, columns] = each.expected
            self._is_free[number, columns] = False

    def find(self, records: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the number of the first pattern of each record, ``(n,)``; -1 where it has none."""
        if not self.patterns:
            return np.full(len(records), -1)
        values = records.take(self._places, axis=1)
        is_same = ((values[:, None] == self._expected) | self._is_free).all(axis=2)
        return np.where(is_same.any(axis=1), is_same.argmax(axis=1), -1)


class AlikeDecoder:
    """Decodes batches of small records.

    Args:
        schema: What the records hold.
        needs_labels: Whether a record without its labels key is bad.
    """

    def __init__(self, schema: Schema, *, needs_labels: bool) -> None:
        self._schema = schema
        self._needs_labels = needs_labels
        self._layouts = [Layout(modality, schema.level) for modality in schema.modalities]
        self._patterns: dict[int, _Patterns] = {}  # by the records' length
        self._num_patterns = 0
        self._num_misses = 0

    @property
    def is_worth_it(self) -> bool:
        """Whether the batches so far were decoded together, or too few were tried to know."""
        return self._num_misses < MOST_MISSES

    def decode(self, groups: Groups) -> Videos | None:
        """Return the videos of records, or None where any of them has to be decoded by itself.

        Args:
            groups: Records of one length each: their places in the batch, and ``(n, length)``.
        """
        videos = self._decoded(groups)
        self._num_misses = 0 if videos is not None else self._num_misses + 1
        return videos

    def _decoded(self, groups: Groups) -> Videos | None:
        size = sum(len(rows) for rows, _ in groups)
        ids, parts = [""] * size, []
        labelled: list[NDArray[np.int64]] = []  # the rows whose labels come one after the other
        packed: list[NDArray[np.uint8]] = []
        widths: list[int] = []
        for rows, records in groups:
            for pattern, which in self._matched(records):
                if pattern is None:
                    return None
                alike = records if len(which) == len(records) else records[which]
                places = rows[which]
                parts.append(Part(places, self._frames(pattern, alike)))
                width = pattern.id.stop - pattern.id.start
                names = alike[:, pattern.id].tobytes()
                for number, row in enumerate(places.tolist()):
                    name = names[number * width : (number + 1) * width]
                    ids[row] = name.decode(errors="backslashreplace")
                if pattern.labels is not None:
                    labelled.append(places)
                    packed.append(alike[:, pattern.labels].reshape(-1))
                    widths += [pattern.labels.stop - pattern.labels.start] * len(places)
        classes = self._classes(size, labelled, packed, np.array(widths, np.int64))
        return None if classes is None else Videos(ids, classes, parts)

    def _matched(
        self, records: NDArray[np.uint8]
    ) -> list[tuple[_Pattern | None, NDArray[np.int64]]]:
        """Return the patterns of some records of one length, and which records have each."""
        known = self._patterns.setdefault(records.shape[1], _Patterns())
        numbers = known.find(records)
        while (unknown := numbers < 0).any():
            pattern = self._pattern(records[unknown.argmax()])
            if pattern is None or self._num_patterns == PATTERNS_KEPT:
                return [(None, np.flatnonzero(unknown))]
            known.add(pattern)
            self._num_patterns += 1
            numbers = known.find(records)
        if len(known.patterns) == 1:
            return [(known.patterns[0], np.arange(len(records)))]
        return [
            (known.patterns[number], np.flatnonzero(numbers == number))
            for number in set(numbers.tolist())
        ]

    def _pattern(self, record: NDArray[np.uint8]) -> _Pattern | None:
        """Return the pattern of a record; None where it is not laid out as writers usually do."""
        try:
            context, feature_lists = split(record.data)
        except DecodeError:
            return None
        streams = feature_lists if self._schema.level == "frame" else context
        is_fixed = np.ones(len(record), np.bool_)
        id_key, labels_key = self._schema.id_key.encode(), self._schema.labels_key.encode()
        identity = _short(record, context, id_key, ID_TAG)
        labels = _short(record, context, labels_key, LABELS_TAG)
        if identity is None or (labels is None and (self._needs_labels or labels_key in context)):
            return None
        spans, counts = [], set()
        for layout in self._layouts:
            span = _span(record, streams, layout.key)
            if span is None or layout.strided(record[span].data) is None:
                return None
            spans.append(span)
            frames = is_fixed[span].reshape(-1, layout.frame.itemsize)
            frames[:, layout.header_bytes :] = False
            counts.add(len(frames))
        if len(counts) > 1 or not 0 < counts.pop() <= self._schema.max_frames:
            return None
        is_fixed[identity] = False
        if labels is not None:
            is_fixed[labels] = False
        for features in (context, feature_lists):
            for key in set(features) - {id_key, labels_key, *(each.key for each in self._layouts)}:
                other = _span(record, features, key)  # which nobody looks at
                if other is not None:
                    is_fixed[other] = False
        places = np.flatnonzero(is_fixed)
        return _Pattern(places, record[places], identity, labels, spans)

    def _frames(self, pattern: _Pattern, records: NDArray[np.uint8]) -> list[NDArray[np.generic]]:
        """Return the frames of records of a pattern."""
        found: list[NDArray[np.generic]] = []
        for layout, span in zip(self._layouts, pattern.frames, strict=True):
            framed = records[:, span].reshape(len(records), -1, layout.frame.itemsize)
            found.append(framed[..., layout.header_bytes :].view(layout.value_type))
        return found

    def _classes(
        self,
        size: int,
        labelled: Sequence[NDArray[np.int64]],
        packed: Sequence[NDArray[np.uint8]],
        widths: NDArray[np.int64],
    ) -> list[NDArray[np.int64]] | None:
        """Return the class indices of each record; None where a label is not one of the classes.

        Args:
            size: The number of records.
            labelled: The records whose labels follow.
            packed: Their labels, as protobuf packs integers, one record after the other.
            widths: How many bytes each of these records has.
        """
        if not packed:
            return [np.empty(0, np.int64)] * size
        text = np.concatenate(packed)
        is_last = text < 0x80
        if not is_last[np.cumsum(widths) - 1].all():
            return None
        lasts = np.flatnonzero(is_last)
        firsts = np.concatenate([[0], lasts[:-1] + 1])
        if (lasts - firsts).max() >= LONGEST_LABEL:
            return None
        shifts = 7 * (np.arange(text.size) - np.repeat(firsts, lasts - firsts + 1))
        labels = np.add.reduceat((text & 0x7F).astype(np.int64) << shifts, firsts)
        if labels.max() >= self._schema.num_classes:
            return None
        rows = np.repeat(np.concatenate(labelled), widths)[lasts]
        keys = np.unique(rows * self._schema.num_classes + labels)  # by record, then by class
        rows, labels = np.divmod(keys, self._schema.num_classes)
        bounds = np.searchsorted(rows, np.arange(size + 1)).tolist()
        return [labels[start:stop] for start, stop in pairwise(bounds)]


def _span(record: NDArray[np.uint8], features: Features, key: bytes) -> slice | None:
    """Return where in a record the value of a key lies; None where it is not in one piece."""
    parts = features.get(key, ())
    if len(parts) != 1 or not len(parts[0]):
        return None
    start = _address(np.frombuffer(parts[0], np.uint8)) - _address(record)
    stop = start + len(parts[0])
    return slice(start, stop) if start >= 0 and stop <= len(record) else None


def _short(record: NDArray[np.uint8], features: Features, key: bytes, tag: int) -> slice | None:
    """Return where the one value of a key lies that is a ``Feature`` of fewer than 128 bytes."""
    span = _span(record, features, key)
    if span is None:
        return None
    size = span.stop - span.start
    header = [tag, size - 2, 0x0A, size - HEADER]
    if not HEADER < size < 0x80 or record[span][:HEADER].tolist() != header:
        return None
    return slice(span.start + HEADER, span.stop)


def _address(values: NDArray[np.uint8]) -> int:
    return int(values.__array_interface__["data"][0])
