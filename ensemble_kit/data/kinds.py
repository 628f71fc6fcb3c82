"""The kinds of records that are recognised by their keys."""

from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

from ensemble_kit.choices import Level
from ensemble_kit.data.decode import describe_keys
from ensemble_kit.data.fields import Features, split
from ensemble_kit.data.protos import Feature, FeatureList
from ensemble_kit.data.schema import Modality, Schema
from ensemble_kit.errors import RecordError

WRITE_A_SCHEMA = "Write a schema TOML for these records and name it with --schema."


class Kind(NamedTuple):
    """A published data set's layout.

    Attributes:
        title: What people call it.
        level: As in ``Schema``.
        id_key: The key of the video id, which differs between the years of YouTube-8M.
        modalities: Name and key of each modality, in joining order.
        num_classes: C.
    """

    title: str
    level: Level
    id_key: str
    modalities: tuple[tuple[str, str], ...]
    num_classes: int


_FRAMES = (("rgb", "rgb"), ("audio", "audio"))
_MEANS = (("rgb", "mean_rgb"), ("audio", "mean_audio"))
KINDS = (
    Kind("YouTube-8M frame level (2018)", "frame", "id", _FRAMES, 3862),
    Kind("YouTube-8M frame level (2017)", "frame", "video_id", _FRAMES, 4716),
    Kind("YouTube-8M video level (2018)", "video", "id", _MEANS, 3862),
    Kind("YouTube-8M video level (2017)", "video", "video_id", _MEANS, 4716),
    Kind("AudioSet frame level", "frame", "video_id", (("audio", "audio_embedding"),), 527),
)
LABELS_KEY = "labels"


def find_schema(record: bytes | memoryview, *, path: Path, number: int = 1) -> Schema:
    """Return the schema that a record's keys imply; widths are those of the record itself.

    The labels key is not looked for: the challenge's test records have none.

    Args:
        record: The first record of some files.
        path: The file it is from.
        number: Which record of the file it is, counted from 1.

    Raises:
        RecordError: The record's keys are of no known kind, or it has no frame.
    """
    try:
        found = split(record)
        for kind in KINDS:
            streams = found[1] if kind.level == "frame" else found[0]
            keys = {key.encode() for _, key in kind.modalities}
            if keys <= streams.keys() and kind.id_key.encode() in found[0]:
                return _schema_of(kind, streams)
    except (DecodeError, IndexError, ValueError) as error:  # ValueError: features of no width
        raise RecordError(
            f"{path}, record {number}: it has no frame to derive a schema from.",
            hint=WRITE_A_SCHEMA,
        ) from error
    raise RecordError(
        f"{path}, record {number}: its keys are of no known kind (found {describe_keys(found)}).",
        hint=WRITE_A_SCHEMA,
    )


def title_of(schema: Schema) -> str:
    """Return what people call records with this schema's keys, whatever its widths and classes."""
    modalities = tuple((modality.name, modality.key) for modality in schema.modalities)
    for kind in KINDS:
        if (kind.level, kind.id_key, kind.modalities) == (schema.level, schema.id_key, modalities):
            return kind.title
    return f"{schema.level} level, not a published layout"


def _schema_of(kind: Kind, streams: Features) -> Schema:
    return Schema(
        level=kind.level,
        modalities=tuple(
            _modality(name, key, kind.level, b"".join(streams[key.encode()]))
            for name, key in kind.modalities
        ),
        id_key=kind.id_key,
        labels_key=LABELS_KEY,
        num_classes=kind.num_classes,
    )


def _modality(name: str, key: str, level: str, payload: bytes) -> Modality:
    is_list = level == "frame"
    feature = FeatureList.FromString(payload).feature[0] if is_list else Feature.FromString(payload)
    if feature.WhichOneof("kind") == "float_list":
        width = len(feature.float_list.value)
        return Modality(name=name, key=key, width=width, value_type="float32")
    width = len(feature.bytes_list.value[0])
    return Modality(name=name, key=key, width=width, value_type="uint8")
