"""What a set of records holds: modalities, widths, keys and classes.

Imports ``errors`` and ``files`` only (and pydantic, which keeps every field strict).
"""

import csv
import difflib
import hashlib
import io
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ensemble_kit.choices import InputType, Level
from ensemble_kit.errors import PredictionsError, RecordError
from ensemble_kit.files import written_aside

MAX_FRAMES = 300  # what the starter code of YouTube-8M reads of a video
MODALITY_NAME = r"^[a-z][a-z0-9_]*$"
# A modality's name is the name of a graph input, beside these of the graph's own.
GRAPH_NAMES = frozenset({"num_frames", "probabilities", "labels", "confidences"})


class Modality(BaseModel):
    """One stream of features.

    Attributes:
        name: What recipes and graph inputs call it, such as ``rgb``.
        key: The record's key for it, such as ``rgb``, ``mean_rgb`` or ``audio_embedding``.
        width: D, features in one frame.
        value_type: ``uint8`` for quantised bytes, ``float32`` for numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=MODALITY_NAME)]
    key: Annotated[str, Field(min_length=1)]
    width: Annotated[int, Field(ge=1)]
    value_type: InputType


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

    level: Level
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
        if taken := [name for name in names if name in GRAPH_NAMES]:
            raise ValueError(f"no modality may be named {taken[0]}, as the models' files use it")
        if self.label_names is not None and len(self.label_names) != self.num_classes:
            raise ValueError(f"{len(self.label_names)} label names for {self.num_classes} classes")
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
        return vocabulary_sha256(self.names)

    def with_label_names(self, path: Path) -> "Schema":
        """Return a copy that carries the names read from a CSV file of classes."""
        return Schema.model_validate(
            self.model_dump() | {"label_names": read_label_names(path, self.num_classes)}
        )


def vocabulary_sha256(names: Sequence[str]) -> str:
    """Return the SHA-256 of class names in order."""
    return hashlib.sha256(json.dumps(tuple(names)).encode()).hexdigest()


def read_schema(path: Path) -> Schema:
    """Read a schema from TOML, strictly.

    ``label_names`` may be the list of names, or the path of a CSV file of classes, relative to
    the folder of ``path``.

    Raises:
        RecordError: The file is missing or is no TOML, a key is unknown or missing, a value is not
            what the schema asks for, or the label names cannot be read.
    """
    text = _read_text(path, hint="Name a schema TOML that exists.")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecordError(f"{path} is not TOML: {error}.", hint="Correct the file.") from error
    names_file = values.get("label_names")
    if isinstance(names_file, str):
        del values["label_names"]
    try:
        schema = Schema.model_validate(values)
    except ValidationError as error:
        raise _mendable(error, path) from error
    if isinstance(names_file, str):
        return schema.with_label_names(path.parent / names_file)
    return schema


def write_schema(
    schema: Schema, path: Path, *, label_names_file: str | None = None, force: bool
) -> None:
    """Write a schema as TOML that ``read_schema`` reads back equal.

    Args:
        schema: What to write.
        path: The file to write.
        label_names_file: Name this CSV file of classes, relative to the folder of ``path``, where
            the names themselves would be written otherwise.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    values = schema.model_dump(exclude={"modalities"}, exclude_none=True)
    if label_names_file is not None:
        values["label_names"] = label_names_file
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for modality in schema.modalities:
        lines += ["", "[[modalities]]"]
        lines += [f"{key} = {_toml(value)}" for key, value in modality.model_dump().items()]
    with written_aside(path, force=force) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def read_label_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """Read the names of the classes from a CSV file with a header.

    The first column is the class index, the last one the name: ``label_id,label_name`` as
    YouTube-8M has it, ``index,mid,display_name`` as AudioSet does. Rows may come in any order. A
    row with too many columns has commas in its name that nobody quoted, as YouTube-8M's
    ``271,Nike, Inc.``; they are put back.

    Args:
        path: The CSV file, in UTF-8.
        num_classes: C; the indices must be 0 to C - 1, each once.

    Returns:
        C names, by class index.

    Raises:
        RecordError: The file is missing, a row has no index of its own, or a class has no row.
    """
    text = _read_text(path, hint="Name a CSV file of classes that exists.")
    reader = csv.reader(io.StringIO(text, newline=""))
    width = max(2, len(next(reader, ())))
    names: dict[int, str] = {}
    for row in filter(None, reader):
        index = int(row[0]) if row[0].isdecimal() else -1
        if len(row) < width or not 0 <= index < num_classes or index in names:
            raise RecordError(
                f"{path}, line {reader.line_num}: found {','.join(row)!r}, expected an index from "
                f"0 to {num_classes - 1} that no line above has, and a name.",
                hint="Write each class once under one header: its index first, its name last.",
            )
        names[index] = ",".join(row[width - 1 :])
    if len(names) < num_classes:
        missing = next(index for index in range(num_classes) if index not in names)
        raise RecordError(
            f"{path} names {len(names)} of {num_classes} classes; class {missing} is missing.",
            hint="Name the file that belongs to these records, or correct num_classes.",
        )
    return tuple(names[index] for index in range(num_classes))


def _read_text(path: Path, *, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}.", hint=hint) from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not text in UTF-8.", hint=hint) from error


def _toml(value: Any) -> str:
    """Write a string, a number or a tuple of strings as TOML, whose strings are JSON's but DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _mendable(error: ValidationError, path: Path) -> RecordError:
    """Say one thing that is wrong with a schema, in words of its file.

    An unknown key comes before a missing one: it may be the missing one, misspelt.
    """
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])[1:]
    if first["type"] == "extra_forbidden":
        known = Modality.model_fields if len(first["loc"]) > 1 else Schema.model_fields
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"Write {near[0]}." if near else f"Use the keys {', '.join(known)}."
        return RecordError(f"{path}: {place} is not a key of a schema.", hint=hint)
    if first["type"] == "missing":
        return RecordError(f"{path}: {place} is missing.", hint=f"Add {place}.")
    fault = first["msg"].removeprefix("Value error, ")
    if place:
        fault = f"{place} is {first['input']!r}: {fault}"
    return RecordError(f"{path}: {fault}.", hint="Correct the file.")


def check_fits(model: Schema, records: Schema, *, path: Path) -> None:
    """Raise unless records have the modalities and the vocabulary that a model was made for.

    Raises:
        PredictionsError: They differ.
    """
    if model.interface != records.interface:
        raise PredictionsError(
            f"{path} has {_describe(model)}, but these records have {_describe(records)}.",
            hint="Use records with the same modalities, widths and value types.",
        )
    if model.num_classes != records.num_classes:
        raise PredictionsError(
            f"{path} has {model.num_classes} classes, but these records have "
            f"{records.num_classes}.",
            hint="Use records of the same vocabulary, or give their schema with --schema.",
        )
    if None not in (model.label_names, records.label_names) and (
        model.vocabulary_sha256 != records.vocabulary_sha256
    ):
        index = next(
            i for i, pair in enumerate(zip(model.names, records.names, strict=True))
            if pair[0] != pair[1]
        )  # fmt: skip
        raise PredictionsError(
            f"{path} calls class {index} {model.names[index]!r}, but these records call it "
            f"{records.names[index]!r}.",
            hint="Use records of the same vocabulary, or their own --label-names.",
        )


def _describe(schema: Schema) -> str:
    return ", ".join(f"{m.name} ({m.width} {m.value_type})" for m in schema.modalities)
