"""What a set of records holds: modalities, widths, keys and classes."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ensemble_kit.choices import MAX_CLASSES, MAX_LENGTH, MAX_WIDTH, AnyPath, InputType, Level
from ensemble_kit.csv_lines import class_index
from ensemble_kit.errors import PredictionsError, RecordError, shown
from ensemble_kit.files import written_aside
from ensemble_kit.texts import parse_toml, read_text
from ensemble_kit.validation import complaints
from ensemble_kit.wording import counted

T = TypeVar("T")
MAX_FRAMES = 300  # what the starter code of YouTube-8M reads of a video
LABEL_NAMES = "label_names.csv"  # the names of the classes, beside schema.toml
# What the first column of a file of classes is called; a plain list has no such line.
INDEX_COLUMNS = frozenset({"index", "id", "label", "label_id", "class", "class_id"})
MODALITY_NAME = r"^[a-z][a-z0-9_]*$"
DIFFERENCE_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "modalities": "Use records with the same modalities, widths and value types.",
        "classes": "Use records of the same vocabulary, or give their schema with --schema.",
        "label names": "Use records of the same vocabulary, or their own --label-names.",
    }
)
# A modality's name is the name of a graph input, beside these of the graph's own.
GRAPH_NAMES = frozenset({"num_frames", "probabilities", "labels", "confidences"})


class Difference(NamedTuple):
    """What two sets of classes, or two schemas, do not share.

    Attributes:
        what: ``modalities``, ``classes`` or ``label names``.
        ours: What is said of the first: ``has 4 classes``.
        theirs: What is said of the others: ``have 3``.
    """

    what: Literal["modalities", "classes", "label names"]
    ours: str
    theirs: str

    def between(self, one: str, others: str) -> str:
        """Say it in a sentence.

        Args:
            one: The first, a noun in the singular.
            others: A noun in the plural.
        """
        return f"{one} {self.ours}, but {others} {self.theirs}."


class Vocabulary(NamedTuple):
    """The classes of records, of a model or of predictions.

    Attributes:
        num_classes: C.
        label_names: Their names, C of them; None where they are not known.
    """

    num_classes: int
    label_names: tuple[str, ...] | None = None

    def difference(self, other: "Vocabulary") -> Difference | None:
        """Return how another one differs; names that one of the two does not know do not."""
        if self.num_classes != other.num_classes:
            ours = f"has {counted(self.num_classes, 'class', 'classes')}"
            return Difference("classes", ours, f"have {other.num_classes:,}")
        pairs = zip(self.label_names or (), other.label_names or (), strict=False)
        for index, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                return Difference(
                    "label names", f"calls class {index} {ours!r}", f"call it {theirs!r}"
                )
        return None


def _all_text(names: Any) -> Any:
    """Raise ``ValueError`` at the first name that is none: pydantic would complain of each."""
    for index, name in enumerate(names if isinstance(names, list | tuple) else ()):
        if not isinstance(name, str):
            raise ValueError(f"name {index} is {shown(name)}, expected text")
    return tuple(names) if isinstance(names, list) else names


Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_all_text)]


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
    width: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
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
        frames_per_second: How many frames are a second of the video, for windows of seconds.
        label_names: The classes' names, ``num_classes`` of them, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    level: Level
    modalities: Annotated[tuple[Modality, ...], Field(min_length=1, strict=False)]
    id_key: str
    labels_key: str
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    max_frames: Annotated[int, Field(ge=1, le=MAX_LENGTH)] = MAX_FRAMES
    frames_per_second: Annotated[float, Field(gt=0, le=1000, strict=False)] = 1.0
    label_names: Annotated[Names | None, Field(strict=False)] = None

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

    def ordered(self, values: Mapping[str, T]) -> dict[str, T]:
        """Return the values of all modalities, by name, in joining order."""
        return {modality.name: values[modality.name] for modality in self.modalities}

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

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes."""
        return Vocabulary(self.num_classes, self.label_names)

    def differences(self, other: "Schema") -> list[Difference]:
        """Return how another schema differs in what a model sees: modalities first, then classes.

        Label names that one of the two does not have are no difference.
        """
        found = []
        if self.interface != other.interface:
            ours, theirs = f"has {self._modalities}", f"have {other._modalities}"
            found.append(Difference("modalities", ours, theirs))
        if (difference := self.vocabulary.difference(other.vocabulary)) is not None:
            found.append(difference)
        return found

    @property
    def _modalities(self) -> str:
        return ", ".join(f"{m.name} ({m.width} {m.value_type})" for m in self.modalities)

    def with_label_names(self, path: AnyPath) -> "Schema":
        """Return a copy that carries the names read from a CSV file of classes."""
        return Schema.model_validate(
            self.model_dump() | {"label_names": read_label_names(path, self.num_classes)}
        )


def vocabulary_sha256(names: Sequence[str]) -> str:
    """Return the SHA-256 of class names in order."""
    return hashlib.sha256(json.dumps(tuple(names)).encode()).hexdigest()


def read_schema(path: AnyPath) -> Schema:
    """Read a schema from TOML, strictly.

    ``label_names`` may be the list of names, or the path of a CSV file of classes, relative to
    the folder of ``path``.

    Raises:
        RecordError: The file is missing or is no TOML, a key is unknown or missing, a value is not
            what the schema asks for, or the label names cannot be read.
    """
    path = Path(path)
    text = read_text(path, RecordError, hint="Name a schema TOML that exists.")
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise RecordError(f"{path} is not TOML: {error}.", hint="Correct the file.") from error
    names_file = values.get("label_names")
    if isinstance(names_file, str):
        del values["label_names"]
    try:
        schema = Schema.model_validate(values)
    except ValidationError as error:
        first = complaints(error, Schema, owner="a schema")[0]
        raise RecordError(f"{path}: {first.problem}.", hint=first.hint) from error
    if isinstance(names_file, str):
        return schema.with_label_names(path.parent / names_file)
    return schema


def write_schema(
    schema: Schema, path: AnyPath, *, label_names_file: str | None = None, force: bool
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
    with written_aside(Path(path), force=force) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def write_label_names(path: AnyPath, names: Sequence[str], *, force: bool) -> None:
    """Write the names of the classes as a CSV file that ``read_label_names`` reads.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    with (
        written_aside(Path(path), force=force) as aside,
        aside.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("label_id", "label_name"), *enumerate(names)])


def read_label_names(path: AnyPath, num_classes: int | None = None) -> tuple[str, ...]:
    """Read the names of the classes: a CSV file with a header, or a plain list.

    In a CSV file the first column is the class index. The name is in the column ``Name``, as
    YouTube-8M's ``vocabulary.csv`` of nine columns has it, or else in the last one:
    ``label_id,label_name`` as YouTube-8M's lists of names have it, ``index,mid,display_name`` as
    AudioSet's ``class_labels_indices.csv``. Rows may come in any order. A row with too many columns
    has commas in a name at its end that nobody quoted, as YouTube-8M's ``271,Nike, Inc.``; they are
    put back.

    A file whose second line does not start with an index, and whose first line is no header of
    ``INDEX_COLUMNS``, is a plain list: the name of class 0, of class 1, and so on, one a line.

    Args:
        path: The file, in UTF-8, gzipped or not.
        num_classes: C; None takes as many classes as there are names.

    Returns:
        C names, by class index.

    Raises:
        RecordError: The file is missing, a row of a CSV file has no index that no other row has, a
            name is empty or that of another class, or a class has no name.
    """
    path = Path(path)
    text = read_text(path, RecordError, hint="Name a CSV file of classes that exists.")
    lines = list(_rows(path, text.removeprefix("\ufeff").rstrip()))
    rows = [(number, row) for number, row in lines if row]
    if _is_plain_list(rows):
        names = _names_in_order(path, lines, num_classes)  # a line left empty is a name left out
    else:
        names = _names_by_class(path, rows, num_classes or max(1, len(rows) - 1))
    num_classes = num_classes or max(1, len(names))
    if len(names) < num_classes:
        missing = next(index for index in range(num_classes) if index not in names)
        raise RecordError(
            f"{path} names {len(names)} of {num_classes} classes; class {missing} is missing.",
            hint="Name the file that belongs to these records, or correct num_classes.",
        )
    return tuple(names[index] for index in range(num_classes))


def _is_plain_list(rows: Sequence[tuple[int, Sequence[str]]]) -> bool:
    if not rows or (len(rows[0][1]) > 1 and rows[0][1][0].strip().lower() in INDEX_COLUMNS):
        return False
    second = rows[min(1, len(rows) - 1)][1]
    return len(second) < 2 or class_index(second[0], MAX_CLASSES) is None


def _names_in_order(
    path: Path, rows: Sequence[tuple[int, Sequence[str]]], num_classes: int | None
) -> dict[int, str]:
    """Return the names of a plain list, whose commas belong to them."""
    classes: dict[str, int] = {}
    for index, (number, row) in enumerate(rows):
        name = ",".join(row).strip()
        problem = ""
        if index == (num_classes or MAX_CLASSES):
            problem = f"but the list has the names of {counted(index, 'class', 'classes')} already"
        elif not name:
            problem = f"which gives class {index} no name"
        elif name in classes:
            problem = f"whose name class {classes[name]} has already"
        if problem:
            raise RecordError(
                f"{path}, line {number}: found {shown(','.join(row))}, {problem}.",
                hint="Write the name of each class on its own line, in the order of the classes.",
            )
        classes[name] = index
    return {index: name for name, index in classes.items()}


def _names_by_class(
    path: Path, rows: Sequence[tuple[int, Sequence[str]]], num_classes: int
) -> dict[int, str]:
    header = rows[0][1] if rows else ()
    if header and class_index(header[0], MAX_CLASSES) is not None:
        raise RecordError(
            f"{path}: the first line is {shown(','.join(header))}, expected a header.",
            hint="Put a line above the classes that names the columns, such as index,name.",
        )
    width = max(2, len(header))
    column = header.index("Name") if "Name" in header[1:] else width - 1
    names: dict[int, str] = {}
    classes: dict[str, int] = {}
    for number, row in rows[1:]:
        index = class_index(row[0], num_classes)
        problem = (
            f"expected an index from 0 to {num_classes - 1} that no line above has, and a name"
        )
        if len(row) >= width and index is not None and index not in names:
            name = (",".join(row[column:]) if column == width - 1 else row[column]).strip()
            if name and name not in classes:
                names[index], classes[name] = name, index
                continue
            problem = f"which gives class {index} no name"
            if name:
                problem = f"whose name class {classes[name]} has already"
        raise RecordError(
            f"{path}, line {number}: found {shown(','.join(row))}, {problem}.",
            hint="Write each class once under one header: its index first, its own name last.",
        )
    return names


def _rows(path: Path, text: str) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the rows of a CSV file, and the lines that they end on."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise RecordError(
            f"{path}, line {reader.line_num}: {error}.", hint="Correct the quotes of that line."
        ) from error


def _toml(value: Any) -> str:
    """Write a string, a number or a tuple of strings as TOML, whose strings are JSON's but DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_fits(model: Schema, records: Schema, *, path: Path) -> None:
    """Raise unless records have the modalities and the vocabulary that a model was made for.

    Raises:
        PredictionsError: They differ.
    """
    for difference in model.differences(records):
        raise PredictionsError(
            difference.between(str(path), "these records"), hint=DIFFERENCE_HINTS[difference.what]
        )
