"""What a set of records holds: modalities, widths, keys and classes.

Imports ``errors`` only (and pydantic, which keeps every field strict).
"""

import csv
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ensemble_kit.errors import RecordError

MAX_FRAMES = 300  # PAPERS: at most 300 frames of a video are used


class Modality(BaseModel):
    """One stream of features.

    Attributes:
        name: What recipes and graph inputs call it, such as ``rgb``.
        key: The record's key for it, such as ``rgb``, ``mean_rgb`` or ``audio_embedding``.
        width: D, features in one frame.
        value_type: ``uint8`` for quantised bytes, ``float32`` for numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    key: Annotated[str, Field(min_length=1)]
    width: Annotated[int, Field(ge=1)]
    value_type: Literal["uint8", "float32"]


class Schema(BaseModel):
    """What one set of records holds.

    Attributes:
        level: ``frame`` for ``SequenceExample`` records, ``video`` for ``Example`` records of one
            mean vector a modality, which become one frame.
        modalities: The streams, in the order in which they are joined.
        id_key: The record's key for the video id.
        labels_key: The record's key for the class indices.
        num_classes: C; labels lie in ``[0, C)``.
        max_frames: Frames beyond this many are not read.
        label_names: The classes' names, ``num_classes`` of them, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    level: Literal["frame", "video"]
    modalities: Annotated[tuple[Modality, ...], Field(min_length=1, strict=False)]
    id_key: str
    labels_key: str
    num_classes: Annotated[int, Field(ge=1)]
    max_frames: Annotated[int, Field(ge=1)] = MAX_FRAMES
    label_names: Annotated[tuple[str, ...] | None, Field(strict=False)] = None

    @model_validator(mode="after")
    def _agrees(self) -> "Schema":
        names = [modality.name for modality in self.modalities]
        if len(set(names)) < len(names):
            raise ValueError(f"two modalities share a name: {', '.join(names)}")
        if self.label_names is not None and len(self.label_names) != self.num_classes:
            raise ValueError(
                f"{len(self.label_names)} label names for {self.num_classes} classes"
            )
        return self

    @property
    def widths(self) -> dict[str, int]:
        """The width of each modality, in joining order."""
        return {modality.name: modality.width for modality in self.modalities}

    @property
    def interface(self) -> tuple[tuple[str, int, str], ...]:
        """What a model sees of the schema: name, width and value type of each modality."""
        return tuple((m.name, m.width, m.value_type) for m in self.modalities)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names; their indices where the schema has none."""
        return self.label_names or tuple(str(index) for index in range(self.num_classes))

    @property
    def vocabulary_sha256(self) -> str:
        """The SHA-256 of the class names in order: two sets of records with it share labels."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def with_label_names(self, path: Path) -> "Schema":
        """Return a copy that carries the names read from a CSV file of classes."""
        return Schema.model_validate(
            self.model_dump() | {"label_names": read_label_names(path, self.num_classes)}
        )
