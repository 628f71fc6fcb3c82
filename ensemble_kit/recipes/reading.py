"""Recipes: strict reading of ``models/**/*.toml`` and of the values set over them.

A recipe names a part at each place of the wiring and gives its arguments, the training schedule,
and the source of every number. Imports ``errors``, ``provenance`` and ``recipe_tables``.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from os.path import isfile
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError

from ensemble_kit.errors import RecipeError, shown
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
from ensemble_kit.texts import parse_toml, read_text
from ensemble_kit.validation import complaints, near

ENSEMBLES = "ensembles.toml"  # in a folder of recipes: not a recipe, see recipes/ensembles.py
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
        if file.name.endswith(".toml") and file.name != ENSEMBLES
    )


def read_recipe_text(name: str) -> RecipeMetadata:
    """Find a recipe by its shipped name or by the path of a TOML file, and read its text.

    Raises:
        RecipeError: There is no such recipe or file, or it is not text.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not isfile(path):
            raise RecipeError(
                f"{name} does not exist.",
                hint="Name a TOML file that exists, or a recipe of `ensemble-kit recipes list`.",
            )
        text = read_text(path, RecipeError, hint="Name a TOML file that you may read.")
        return RecipeMetadata(name=path.stem, text=text)
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"There is no recipe {name!r}{near(name, names)}.",
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
        tables = parse_toml(record.text)
    except ValueError as error:
        raise RecipeError(
            f"Recipe {record.name} is not TOML: {error}.", hint="Correct the file at that place."
        ) from error
    for override in record.overrides:
        _set(tables, override)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        first = complaints(error, Recipe, owner="a recipe")[0]
        raise RecipeError(f"Recipe {record.name}: {first.problem}.", hint=first.hint) from error
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
            f"--set {shown(override)} is not of the form table.key=value.",
            hint="Write for example --set pooling.num_clusters=16.",
        )
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # a bare word: --set head.name=logistic needs no quotes
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise RecipeError(
                f"--set {shown(override)}: {parent} is a value, not a table.",
                hint="Set the value itself, or name a key of a table.",
            )
    tables[last] = value
