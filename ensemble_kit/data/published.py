"""The schemas of published data sets by name, to size recipes without records at hand."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ensemble_kit.choices import Published
from ensemble_kit.data.schema import Modality, Schema, read_schema
from ensemble_kit.errors import RecordError


def _frame_level(id_key: str, num_classes: int, widths: Mapping[str, tuple[str, int]]) -> Schema:
    value_type: Literal["uint8"] = "uint8"
    return Schema(
        level="frame",
        modalities=tuple(
            Modality(name=name, key=key, width=width, value_type=value_type)
            for name, (key, width) in widths.items()
        ),
        id_key=id_key,
        labels_key="labels",
        num_classes=num_classes,
    )


_YOUTUBE8M = {"rgb": ("rgb", 1024), "audio": ("audio", 128)}
PUBLISHED: Mapping[Published, Schema] = MappingProxyType(
    {
        "youtube8m-2018": _frame_level("id", 3862, _YOUTUBE8M),
        "youtube8m-2017": _frame_level("video_id", 4716, _YOUTUBE8M),
        "audioset": _frame_level("video_id", 527, {"audio": ("audio_embedding", 128)}),
    }
)


def named_schema(name: str) -> Schema:
    """Return a published schema by its name, or read the schema TOML of that path.

    Raises:
        RecordError: It is neither, or the TOML cannot be read.
    """
    for published, schema in PUBLISHED.items():
        if name == published:
            return schema
    if not name.endswith(".toml"):
        raise RecordError(
            f"There is no schema {name!r}.",
            hint=f"Name one of {', '.join(PUBLISHED)}, or a schema TOML.",
        )
    return read_schema(Path(name))
