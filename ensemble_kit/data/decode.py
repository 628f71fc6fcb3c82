"""The bytes of one record to one video, by a schema.

Parsing a frame-level record as a protobuf message makes an object for each of its 300 frames and
two modalities, and takes longer than the training step that follows. So messages are not parsed
where their layout is the usual one. A record is split into its features, each a view of its bytes
(``fields``). In a ``FeatureList`` of frames that have the same size, as all published data has, a
frame is a constant header (three tags of protobuf with their lengths) followed by its values:

    0A len  0A len  0A len  <values>      FeatureList.feature, Feature.bytes_list, BytesList.value

All frames are therefore one strided view: the headers are compared with the expected one, and the
values stay where they are. The layout follows from protobuf's encoding guide and from
``tensorflow/core/example/feature.proto``. Encoders may write the same message in other ways (in
several parts, with longer lengths, packed or not), and a view would misread those, so a feature
whose headers differ in any byte is parsed by protobuf, value by value, to the same result. That
path also names what is wrong with a frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ensemble_kit.data.fields import Features, split
from ensemble_kit.data.protos import Feature, FeatureList
from ensemble_kit.data.schema import Modality, Schema
from ensemble_kit.data.tfrecord import BadRecord

CORRECT_SCHEMA = "Give a schema that says so, or leave the record out with --skip-bad-records."
MAKE_AGAIN = "Make the record again, or leave it out with --skip-bad-records."
KINDS = {"bytes_list": "bytes", "float_list": "floats", "int64_list": "integers", None: "nothing"}


@dataclass(slots=True)
class Video:
    """One video as its record has it.

    Attributes:
        id: The video's id; bytes that are not UTF-8 are written as escapes.
        classes: Class indices, int64, sorted, each once.
        is_labelled: Whether its record has the key of labels; the challenge's test records do not.
        frames: ``(T, D)`` for each modality's name, uint8 or float32 as the schema says. Often a
            read-only view.
    """

    id: str
    classes: NDArray[np.int64]
    frames: dict[str, NDArray[Any]]
    is_labelled: bool = True

    @property
    def num_frames(self) -> int:
        """T, the same for every modality."""
        return len(next(iter(self.frames.values())))


class RecordProblem(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with a record whose place is not known yet."""

    def __init__(self, problem: str, *, kind: str, hint: str = CORRECT_SCHEMA) -> None:
        super().__init__(problem)
        self.kind = kind
        self.hint = hint


class Decoder:
    """Reads records by one schema.

    Args:
        schema: What the records hold.
        needs_labels: Whether a record without its labels key is bad; else it has no classes.
    """

    def __init__(self, schema: Schema, *, needs_labels: bool = True) -> None:
        self._schema = schema
        self._needs_labels = needs_labels
        self._id_key = schema.id_key.encode()
        self._labels_key = schema.labels_key.encode()
        self._layouts = [Layout(modality, schema.level) for modality in schema.modalities]

    def decode(self, record: bytes | memoryview, *, path: Path, number: int) -> Video:
        """Return the video of a record; ``path`` and ``number`` say where it was found.

        Raises:
            BadRecord: The record is not what the schema says.
        """
        try:
            return self._decode(record)
        except RecordProblem as error:
            kind, text, hint = error.kind, str(error), error.hint
        except DecodeError:
            kind, text, hint = (
                "bytes that are no Example",
                "it is neither an Example nor a SequenceExample.",
                MAKE_AGAIN,
            )
        raise BadRecord(path, number, text, kind=kind, hint=hint)

    def _decode(self, record: bytes | memoryview) -> Video:
        context, feature_lists = split(record)
        streams = feature_lists if self._schema.level == "frame" else context
        found = context, feature_lists
        identity = _one_bytes(
            Feature.FromString(_value(context, self._id_key, found)), repr(self._schema.id_key)
        )
        video = identity.decode(errors="backslashreplace")
        is_labelled = self._labels_key in context
        if self._needs_labels or is_labelled:
            classes = self._classes(Feature.FromString(_value(context, self._labels_key, found)))
        else:
            classes = np.empty(0, np.int64)
        frames, lengths = {}, []
        for layout in self._layouts:
            payload = _value(streams, layout.key, found)
            values, length = layout.read(payload, self._schema.max_frames, video=video)
            frames[layout.name] = values
            lengths.append(length)
        if len(set(lengths)) > 1:
            counts = " and ".join(map("{} of {}".format, lengths, frames))
            raise RecordProblem(
                f"its modalities differ in frames: {counts}.",
                kind="modalities of different lengths",
                hint=MAKE_AGAIN,
            )
        if lengths[0] == 0:
            raise RecordProblem("it has no frames.", kind="no frames", hint=MAKE_AGAIN)
        return Video(video, classes, frames, is_labelled)

    def _classes(self, feature: Any) -> NDArray[np.int64]:
        num_classes = self._schema.num_classes
        kind = feature.WhichOneof("kind")
        if kind not in ("int64_list", None):  # nothing at all is how some write an empty list
            raise _wrong_kind(repr(self._schema.labels_key), kind, "integers")
        classes = sorted(set(feature.int64_list.value))
        if classes and not 0 <= classes[0] <= classes[-1] < num_classes:
            raise RecordProblem(
                f"label {classes[0] if classes[0] < 0 else classes[-1]} is outside the "
                f"{num_classes} classes (0 to {num_classes - 1}).",
                kind="a label outside the classes",
            )
        return np.array(classes, np.int64)


class Layout:
    """How the frames of one modality lie in a record whose frames are all alike.

    Args:
        modality: The modality.
        level: ``frame`` for a ``FeatureList``, ``video`` for one ``Feature``.

    Attributes:
        name: The modality's name.
        key: The record's key for it.
        frame: One frame with the header before it, as NumPy's type.
        header_bytes: How long that header is.
        value_type: NumPy's type of a value as it is stored.
    """

    def __init__(self, modality: Modality, level: str) -> None:
        self.name = modality.name
        self.key = modality.key.encode()
        self._width = modality.width
        self._is_list = level == "frame"
        self._dtype = np.dtype("<f4" if modality.value_type == "float32" else "u1")
        # From inside out: a BytesList or FloatList, its Feature, the FeatureList it stands in.
        # Each is one tag and the number of bytes after it.
        size = modality.width * self._dtype.itemsize
        tags = (0x0A, 0x12 if self._dtype.kind == "f" else 0x0A, 0x0A)
        header = b""
        for tag in tags if self._is_list else tags[:2]:
            header = bytes((tag,)) + _varint(size + len(header)) + header
        self._header = header
        self.header_bytes = len(header)
        self.value_type = self._dtype
        self.frame = np.dtype(  # packed, so that floats may start at any byte
            [("header", "u1", (len(header),)), ("values", self._dtype, (modality.width,))]
        )

    def read(
        self, payload: bytes | memoryview, max_frames: int, *, video: str
    ) -> tuple[NDArray[Any], int]:
        """Return at most ``max_frames`` frames, ``(T, D)``, and how many the record has.

        Only the frames that are returned are looked into. ``video`` is its id, for messages.
        """
        values = self.strided(payload)
        if values is not None:
            num_frames, values = len(values), values[:max_frames]
        else:
            features = self.features(payload)
            num_frames, values = len(features), self.parsed(features[:max_frames])
        if self._dtype.kind == "f" and not np.isfinite(values).all():
            frame, value = np.argwhere(~np.isfinite(values))[0]
            raise RecordProblem(
                f"frame {frame + 1} of {self.name} holds {values[frame, value]} in video "
                f"{video!r}.",
                kind="a value that is not finite",
                hint=MAKE_AGAIN,
            )
        return values, num_frames

    def strided(self, payload: bytes | memoryview) -> NDArray[Any] | None:
        """Return all frames as a view of a feature, or None if they are not all alike."""
        stride = self.frame.itemsize
        is_whole = len(payload) % stride == 0 if self._is_list else len(payload) == stride
        if not is_whole:
            return None
        frames = np.frombuffer(payload, self.frame)
        if frames["header"].tobytes() != self._header * len(frames):
            return None
        return frames["values"].astype(self._dtype.newbyteorder("="), copy=False)

    def written(self, values: NDArray[Any]) -> bytes:
        """Return ``(T, D)`` values as the bytes of a feature, which ``strided`` reads back."""
        frames = np.empty(len(values), self.frame)
        frames["header"] = np.frombuffer(self._header, np.uint8)
        frames["values"] = values
        return frames.tobytes()

    def features(self, payload: bytes | memoryview) -> Sequence[Any]:
        """Return the parsed ``Feature`` of each frame."""
        if self._is_list:
            return FeatureList.FromString(payload).feature  # type: ignore[no-any-return]
        return [Feature.FromString(payload)]

    def parsed(self, features: Sequence[Any]) -> NDArray[Any]:
        """Return the frames of parsed features, each checked for its kind and its width."""
        frames = np.empty((len(features), self._width), self._dtype)
        for number, feature in enumerate(features, start=1):
            place = f"frame {number} of {self.name}"
            if self._dtype.kind == "f":
                kind = feature.WhichOneof("kind")
                if kind != "float_list":
                    raise _wrong_kind(place, kind, "floats")
                values = np.array(feature.float_list.value, np.float32)
            else:
                values = np.frombuffer(_one_bytes(feature, place), np.uint8)
            if len(values) != self._width:
                raise RecordProblem(
                    f"{place} has {len(values)} features, the schema says {self._width}.",
                    kind="a frame of another width",
                )
            frames[number - 1] = values
        return frames.astype(frames.dtype.newbyteorder("="), copy=False)


def frame_bytes(schema: Schema) -> int:
    """Return the fewest bytes of a record that a frame of all modalities takes."""
    layouts = [Layout(modality, schema.level) for modality in schema.modalities]
    # Two modalities may be of one key, and a list of one float has a shorter way to be written.
    return sum({layout.key: layout.frame.itemsize - 1 for layout in layouts}.values())


def describe_keys(found: tuple[Features, Features]) -> str:
    """Say which keys a record has."""
    context, lists = (", ".join(sorted(map(_text, features))) for features in found)
    return f"context {context or 'empty'}; feature lists {lists}" if lists else context or "no keys"


def _text(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


def _value(features: Features, key: bytes, found: tuple[Features, Features]) -> bytes | memoryview:
    parts = features.get(key)
    if not parts:
        raise RecordProblem(
            f"it has no {_text(key)!r} where the schema says (found {describe_keys(found)}).",
            kind="a missing key",
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _one_bytes(feature: Any, place: str) -> bytes:
    kind = feature.WhichOneof("kind")
    if kind != "bytes_list":
        raise _wrong_kind(place, kind, "bytes")
    values = feature.bytes_list.value
    if len(values) != 1:
        raise RecordProblem(
            f"{place} holds {len(values)} byte strings, expected 1.",
            kind="a value of another kind",
        )
    return values[0]  # type: ignore[no-any-return]


def _wrong_kind(place: str, kind: str | None, expected: str) -> RecordProblem:
    return RecordProblem(
        f"{place} holds {KINDS[kind]}, expected {expected}.", kind="a value of another kind"
    )


def _varint(value: int) -> bytes:
    """Return a number as protobuf writes it: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))
