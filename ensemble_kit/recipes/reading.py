"""Recipes: strict reading of ``models/**/*.toml`` and of the values set over them.

A recipe names a part at each place of the wiring and gives its arguments, the training schedule,
and the source of every number.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from os.path import isfile
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import PrivateAttr, ValidationError

from ensemble_kit.choices import AnyPath
from ensemble_kit.errors import RecipeError, shown
from ensemble_kit.recipes.own_parts import installed_version, is_own, package_of, table_of
from ensemble_kit.recipes.tables import (
    AnyFusionTable,
    AnyHeadTable,
    AnyModelTable,
    AnyPoolingTable,
    AnySamplingTable,
    HiddenTable,
    InputTable,
    PerModality,
    ReportedTable,
    SourceTable,
    Table,
    TrainingTable,
)
from ensemble_kit.store.provenance import RecipeMetadata
from ensemble_kit.texts import parse_toml, read_text
from ensemble_kit.validation import complaints, near

LOGGER = logging.getLogger(__name__)
ENSEMBLES = "ensembles.toml"  # in a folder of recipes: not a recipe, see recipes/ensembles.py
OTHER = "other"  # in a table of modalities: any that the table does not name


class BaseRecipe(Table):
    """What every recipe has. Made by ``load_recipe`` or ``parse_recipe``."""

    title: str
    source: SourceTable | None = None  # those of the kit all have one

    _metadata: RecipeMetadata = PrivateAttr()

    @property
    def metadata(self) -> RecipeMetadata:
        """The recipe's name, text and overrides, as files carry them."""
        return self._metadata

    @property
    def name(self) -> str:
        """The recipe's name, such as ``willow/gated-net-vlad``."""
        return self._metadata.name


class Recipe(BaseRecipe):
    """A sub-model composed of parts, and its schedule, checked."""

    input: InputTable
    sampling: AnySamplingTable
    pooling: AnyPoolingTable
    fusion: AnyFusionTable | None = None
    hidden: HiddenTable | None = None
    head: AnyHeadTable
    training: TrainingTable
    reported: ReportedTable | None = None


class ModelRecipe(BaseRecipe):
    """Another package's whole model, and its schedule, checked."""

    model: AnyModelTable
    training: TrainingTable
    reported: ReportedTable | None = None


AnyRecipe: TypeAlias = Recipe | ModelRecipe


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


def recipe_template() -> str:
    """Return the text of a small recipe whose comments name what else could stand there."""
    return (recipe_root() / "template.toml").read_text(encoding="utf-8")


def read_recipe_text(name: AnyPath) -> RecipeMetadata:
    """Find a recipe by its shipped name or by the path of a TOML file, and read its text.

    Raises:
        RecipeError: There is no such recipe or file, or it is not text.
    """
    name = os.fspath(name)
    if name.endswith(".toml"):
        path = Path(name)
        if not isfile(path):
            raise RecipeError(
                f"{name} does not exist.",
                hint="Name a TOML file that exists, or a recipe of `ensemble-kit recipes list`.",
            )
        text = read_text(path, RecipeError, hint="Name a TOML file that you may read.")
        return RecipeMetadata(name=path.stem, text=text)
    if name.endswith((".tfrecord", ".tfrecord.gz")):
        raise RecipeError(
            f"{shown(name)} is a file of records, not a recipe.",
            hint="Quote patterns, so that the shell does not spell them out: --train "
            "'train/*.tfrecord'.",
        )
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"There is no recipe {name!r}{near(name, names)}.",
            hint="List the recipes with `ensemble-kit recipes list`, or name a .toml file.",
        )
    folder, stem = name.split("/")
    text = (recipe_root() / folder / f"{stem}.toml").read_text(encoding="utf-8")
    return RecipeMetadata(name=name, text=text)


def load_recipe(name: AnyPath, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Load a recipe and set values over it.

    Args:
        name: A shipped recipe such as ``willow/gru``, or the path of a ``.toml`` file.
        overrides: Each ``table.key=value``, the value as TOML writes it: ``pooling.num_layers=1``.

    Raises:
        RecipeError: The recipe is unknown, is not TOML, or a key or value is not what it must be.
    """
    found = read_recipe_text(name)
    return parse_recipe(found.model_copy(update={"overrides": tuple(overrides)}))


def load_recipes(names: Sequence[str], overrides: Sequence[str] = ()) -> list[AnyRecipe]:
    """Load several recipes, and set each value over those that have its key.

    Args:
        names: As in ``load_recipe``.
        overrides: As in ``load_recipe``, or ``NAME:table.key=value`` for one of ``names`` alone;
            ``gru`` stands for ``willow/gru`` or ``gru.toml`` if no other ends so.

    Raises:
        RecipeError: As ``load_recipe``; or a value is for a recipe that is not in ``names``, or no
            recipe has its key.
    """
    own: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        prefix, separator, _ = override.partition("=")[0].rpartition(":")
        if separator:
            meant = {prefix} & own.keys() or {name for name in own if Path(name).stem == prefix}
            if len(meant) != 1:
                raise RecipeError(
                    f"--set {shown(override)} is for {prefix}, which is not among the recipes"
                    f"{near(prefix, names)}.",
                    hint=f"Name one of: {', '.join(names)}.",
                )
            own[meant.pop()].append(override[len(prefix) + 1 :])
            continue
        taking = [name for name in names if _takes(name, own[name], override)]
        for name in taking or names[:1]:  # one that has no such key says so when it is loaded
            own[name].append(override)
    return [load_recipe(name, own[name]) for name in names]


def _takes(name: str, before: Sequence[str], override: str) -> bool:
    """Return whether a recipe has the key of an override, whatever the value is worth."""
    tables = _tables(read_recipe_text(name))
    for each in before:
        _set(tables, each)
    *parents, last = override.partition("=")[0].strip().split(".")
    table: Any = tables
    for parent in parents:
        table = table.get(parent) if isinstance(table, dict) else None
    if not isinstance(table, dict):
        return False
    _set(tables, override)
    try:
        _kind_of(tables).model_validate(tables)
    except ValidationError as error:
        return not any(
            detail["type"] == "extra_forbidden" and detail["loc"][-1] == last
            for detail in error.errors()
        )
    return True


def recipe_errors(name: str) -> list[RecipeError]:
    """Return all that is wrong with a recipe, the most telling first; nothing where it is one."""
    try:
        load_recipe(name)
    except RecipeError as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            return _errors(read_recipe_text(name), cause)
        return [error]
    return []


def parse_recipe(metadata: RecipeMetadata) -> AnyRecipe:
    """Check a recipe's text with its overrides; see ``load_recipe``."""
    tables = _set_tables(metadata)
    versions = _require_packages(metadata, _own_names(tables))
    try:
        recipe = _kind_of(tables).model_validate(tables)
    except ValidationError as error:
        raise _errors(metadata, error)[0] from error
    recipe._metadata = metadata.model_copy(update={"packages": versions | metadata.packages})
    return recipe


def _kind_of(tables: dict[str, Any]) -> type[Recipe] | type[ModelRecipe]:
    return ModelRecipe if "model" in tables else Recipe


def _errors(metadata: RecipeMetadata, error: ValidationError) -> list[RecipeError]:
    read = _set_tables(metadata)
    tables = {name: table_of(name, Table) for name in _own_names(read)}
    return [
        RecipeError(f"Recipe {metadata.name}: {each.problem}.", hint=each.hint)
        for each in complaints(error, _kind_of(read), owner="a recipe", own_tables=tables)
    ]


def _require_packages(metadata: RecipeMetadata, names: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of the packages whose parts a recipe names.

    Raises:
        RecipeError: The recipe is from a file, and one of them is not installed.
    """
    for package, recorded in metadata.packages.items():
        installed = installed_version(package)
        if installed is None:
            raise RecipeError(
                f"Recipe {metadata.name} has a part of the package {package} {recorded}, which is "
                "not installed.",
                hint=f"Install it: pip install {package}=={recorded}",
            )
        if installed != recorded:
            _warn_of_version(metadata.name, package, recorded, installed)
    found = {package: installed_version(package) for package in map(package_of, names)}
    return {package: version for package, version in found.items() if version is not None}


@cache  # a command reads the recipe of one file several times
def _warn_of_version(name: str, package: str, recorded: str, installed: str) -> None:
    LOGGER.warning(
        "Recipe %s was trained with %s %s; %s is installed, and may compute other numbers.",
        *(name, package, recorded, installed),
    )


def _own_names(values: Any) -> list[str]:
    """Return the names of other packages' parts, wherever a recipe's tables have them."""
    if not isinstance(values, dict):
        return []
    named = [values[key] for key in ("name", "gating") if is_own(values.get(key))]
    return [*named, *(name for value in values.values() for name in _own_names(value))]


def _set_tables(metadata: RecipeMetadata) -> dict[str, Any]:
    tables = _tables(metadata)
    for override in metadata.overrides:
        _set(tables, override)
    return tables


def _tables(metadata: RecipeMetadata) -> dict[str, Any]:
    try:
        return parse_toml(metadata.text)
    except ValueError as error:
        raise RecipeError(
            f"Recipe {metadata.name} is not TOML: {error}.", hint="Correct the file at that place."
        ) from error


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
