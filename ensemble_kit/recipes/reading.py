"""Recipes: strict reading of ``models/**/*.toml`` and of the values set over them.

A recipe names a part at each place of the wiring and gives its arguments, the training schedule,
and the source of every number. Imports ``errors``, ``provenance`` and ``recipe_tables``.
"""

import difflib
import json
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, PrivateAttr, ValidationError

from ensemble_kit.errors import RecipeError
from ensemble_kit.recipes.tables import (
    Fusion,
    Head,
    HiddenTable,
    InputTable,
    PerModality,
    Pooling,
    ReportedTable,
    Sampling,
    SourceTable,
    Table,
    TrainingTable,
)
from ensemble_kit.store.provenance import RecipeMetadata

OTHER = "other"  # in a table of modalities: any that the table does not name


class Recipe(Table):
    """A sub-model and its schedule, checked. Made by ``load_recipe`` or ``parse_recipe``."""

    title: str
    source: SourceTable
    input: InputTable
    sampling: Sampling
    pooling: Pooling
    fusion: Fusion | None = None
    hidden: HiddenTable | None = None
    head: Head
    training: TrainingTable
    reported: ReportedTable | None = None

    _record: RecipeMetadata = PrivateAttr()

    @property
    def record(self) -> RecipeMetadata:
        """The recipe's name, text and overrides, as files carry them."""
        return self._record

    @property
    def name(self) -> str:
        """The recipe's name, such as ``willow/gated-net-vlad``."""
        return self._record.name


def recipe_root() -> Traversable:
    """Return the folder of shipped recipes, in an installed wheel or a checkout."""
    packaged = files("ensemble_kit") / "models"
    checkout = Path(__file__).resolve().parents[2] / "models"
    return packaged if packaged.is_dir() else checkout


def recipe_names() -> list[str]:
    """Return the names of all shipped recipes, sorted."""
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.toml')}"
        for folder in recipe_root().iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    )


def read_recipe_text(name: str) -> RecipeMetadata:
    """Find a recipe by its shipped name or by the path of a TOML file, and read its text.

    Raises:
        RecipeError: There is no such recipe or file, or it is not text.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(
                f"{name} does not exist.",
                hint="Name a TOML file that exists, or a recipe of `ensemble-kit recipes list`.",
            )
        try:
            return RecipeMetadata(name=path.stem, text=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{name} is not text in UTF-8.", hint="Save the file as UTF-8."
            ) from error
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"There is no recipe {name!r}{_near(name, names)}.",
            hint="List the recipes with `ensemble-kit recipes list`, or name a .toml file.",
        )
    folder, stem = name.split("/")
    text = (recipe_root() / folder / f"{stem}.toml").read_text(encoding="utf-8")
    return RecipeMetadata(name=name, text=text)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and set values over it.

    Args:
        name: A shipped recipe such as ``willow/gru``, or the path of a ``.toml`` file.
        overrides: Each ``table.key=value``, the value as TOML writes it: ``pooling.num_layers=1``.

    Raises:
        RecipeError: The recipe is unknown, is not TOML, or a key or value is not what it must be.
    """
    found = read_recipe_text(name)
    return parse_recipe(found.model_copy(update={"overrides": tuple(overrides)}))


def parse_recipe(record: RecipeMetadata) -> Recipe:
    """Check a recipe's text with its overrides; see ``load_recipe``."""
    try:
        tables = tomllib.loads(record.text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"Recipe {record.name} is not TOML: {error}.", hint="Correct the file at that place."
        ) from error
    for override in record.overrides:
        _set(tables, override)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        raise _explain(record.name, error) from error
    recipe._record = record
    return recipe


def recipe_json_schema() -> str:
    """Return the JSON Schema of recipes, which editors use to complete them."""
    return json.dumps(Recipe.model_json_schema(), indent=2)


def for_modality(value: PerModality, modality: str, *, key: str) -> int:
    """Return what a per-modality value says of one modality.

    Args:
        value: One number for all, or a table by modality in which ``other`` stands for the rest.
        modality: The modality's name, or ``joint`` for early modality fusion.
        key: The value's place in the recipe, for the message.

    Raises:
        RecipeError: The table does not name the modality.
    """
    if isinstance(value, int):
        return value
    if modality in value or OTHER in value:
        return value.get(modality, value.get(OTHER, 0))
    raise RecipeError(
        f"{key} has values for {', '.join(value)}, not for {modality}.",
        hint=f"Give it one with --set {key}.{modality}=NUMBER.",
    )


def _set(tables: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not separator or not last:
        raise RecipeError(
            f"--set {override!r} is not of the form table.key=value.",
            hint="Write for example --set pooling.num_clusters=16.",
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word: --set head.name=logistic needs no quotes
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise RecipeError(
                f"--set {override!r}: {parent} is a value, not a table.",
                hint="Set the value itself, or name a key of a table.",
            )
    tables[last] = value


def _explain(name: str, error: ValidationError) -> RecipeError:
    """Turn the most telling of pydantic's complaints into one that names the place and the hint."""
    worst = min(error.errors(), key=_rank)
    table, place = _walk(worst["loc"])
    kind, value = worst["type"], worst["input"]
    if kind == "extra_forbidden":
        known = list(table.model_fields)
        tag = _tag(table)
        owner = f"the part {tag!r}" if tag else "a recipe"
        fault = f"{place} is not a key of {owner}{_near(place.split('.')[-1], known)}"
        hint = f"Use one of the keys: {', '.join(known)}."
    elif kind == "missing":
        fault, hint = f"{place} is missing", f"Give {place} a value."
    elif kind == "union_tag_not_found":
        fault, hint = f"{place}.name is missing", f"Name the part to use as {place}."
    elif kind == "union_tag_invalid":
        expected = [tag.strip("'") for tag in worst["ctx"]["expected_tags"].split(", ")]
        fault = f"{place} has name {value['name']!r}{_near(str(value['name']), expected)}"
        hint = f"Name one of: {', '.join(expected)}."
    else:
        is_table = kind in {"model_type", "model_attributes_type"}
        wanted = "Input should be a table" if is_table else worst["msg"]
        fault = f"{place} is {value!r}: {wanted}"
        hint = f"Give {place} a value of the right type and range."
    return RecipeError(f"Recipe {name}: {fault}.", hint=hint)


def _rank(complaint: Any) -> int:
    """Order complaints: a misspelt key says more than that the right one is missing."""
    if complaint["type"] == "extra_forbidden":
        return 0
    # a table by modality is not a number, but what matters is what is wrong within it
    is_wrong_branch = complaint["type"] == "int_type" and isinstance(complaint["input"], dict)
    return 2 if is_wrong_branch else 1


def _walk(location: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """Return the table that a complaint is about, and its place without pydantic's own words."""
    table: type[BaseModel] = Recipe
    place: list[str] = []
    choices: dict[str, type[BaseModel]] = {}
    for part in location:
        if str(part) in choices and not isinstance(part, int):
            table, choices = choices[str(part)], {}
            continue
        if str(part) in table.model_fields:
            members = _models_in(table.model_fields[str(part)].annotation)
            choices = {tag: model for model in members if (tag := _tag(model))}
            if len(members) == 1:
                table = members[0]
        elif part in {"constrained-int", "dict[str,constrained-int]"}:
            continue  # which branch of a union pydantic tried
        place.append(str(part))
    return table, ".".join(place)


def _tag(table: type[BaseModel]) -> str | None:
    """Return the name that a recipe picks a part by; None for a table that is no part."""
    field = table.model_fields.get("name")
    return str(get_args(field.annotation)[0]) if field else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _near(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
