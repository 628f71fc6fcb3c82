"""Parts that other packages bring, by the names ``package:part`` that recipes give them.

An installed package offers a part as an entry point of the group ``ensemble_kit.parts``::

    [project.entry-points."ensemble_kit.parts"]
    smooth_maximum = "own_pooling:SmoothMaximum"

The colon keeps the two kinds of names apart, so that no package can replace a part of the kit. A
part may say in a class ``Table`` which keys it takes in recipes.
"""

from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from re import sub
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from ensemble_kit.errors import RecipeError, shown
from ensemble_kit.validation import near

GROUP = "ensemble_kit.parts"


class OrOwn:
    """In an annotation: one of the kit's parts as the type says, or one of another package.

    Args:
        shipped: The type of the kit's parts alone.
        base: What the table of another package's part derives from, and is if it has none.
    """

    def __init__(self, shipped: Any, base: type[BaseModel]) -> None:
        self.shipped = shipped
        self.base = base

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of the kit's parts, within one that takes those of others first."""
        return core_schema.no_info_wrap_validator_function(
            self._read,
            handler.generate_schema(self.shipped),
            serialization=core_schema.wrap_serializer_function_ser_schema(self._write),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the JSON Schema of either; editors know nothing of the keys of other packages."""
        name = {"type": "string", "pattern": "^[^:]+:[^:]+$"}
        table = {"type": "object", "properties": {"name": name}, "required": ["name"]}
        return {"anyOf": [handler(schema), name, table]}

    def _write(self, value: Any, write_shipped: Callable[[Any], Any]) -> Any:
        return value.model_dump() if isinstance(value, self.base) else write_shipped(value)

    def _read(self, value: Any, read_shipped: Callable[[Any], Any]) -> Any:
        table = {"name": value} if is_own(value) else value
        if isinstance(table, dict) and is_own(table.get("name")):
            return _read_table(table, table_of(table["name"], self.base))
        return read_shipped(value)


def is_own(name: Any) -> bool:
    """Return whether a name is that of another package's part."""
    return isinstance(name, str) and ":" in name


def package_of(name: str) -> str:
    """Return the package that a part's name begins with, as package indexes write it."""
    return sub(r"[-_.]+", "-", name.partition(":")[0]).lower()


def installed_version(package: str) -> str | None:
    """Return the version of an installed package that offers parts; None if there is none."""
    dists = (entry.dist for name, entry in _offered().items() if package_of(name) == package)
    return next((dist.version for dist in dists if dist is not None), None)


def load_part(name: str) -> Any:
    """Import another package's part.

    Args:
        name: ``package:part``.

    Raises:
        RecipeError: No installed package offers it, or it cannot be imported.
    """
    return _import(_find(name), name)


def table_of(name: str, base: type[BaseModel]) -> type[BaseModel]:
    """Return the table of the keys that another package's part takes in recipes.

    Args:
        name: ``package:part``.
        base: What it has to derive from, and is where the part has none.

    Raises:
        RecipeError: See ``load_part``; or its ``Table`` is for another place of the recipe.
    """
    table = getattr(load_part(name), "Table", base)
    if not (isinstance(table, type) and issubclass(table, base)):
        raise RecipeError(
            f"{name}: its Table is not a {base.__name__}, so it cannot stand at this place.",
            hint=f"Derive it from ensemble_kit.parts.{base.__name__}, or use the part elsewhere.",
        )
    return table


@cache
def _offered() -> dict[str, EntryPoint]:
    return {
        f"{package_of(entry.dist.name)}:{entry.name}": entry
        for entry in entry_points(group=GROUP)
        if entry.dist is not None
    }


def _find(name: str) -> EntryPoint:
    offered = _offered()
    key = f"{package_of(name)}:{name.partition(':')[2]}"
    if key not in offered:
        known = ", ".join(sorted(offered)) or "none"
        raise RecipeError(
            f"No installed package offers the part {shown(name)}{near(name, list(offered))}.",
            hint=f"Install {shown(package_of(name))}, or name a part that is offered: {known}.",
        )
    return offered[key]


@cache
def _import(entry: EntryPoint, name: str) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever the other package raises while it is imported
        raise RecipeError(
            f"The part {name} cannot be imported from {entry.value}: "
            f"{type(error).__name__}: {str(error).rstrip('.')}.",
            hint=f"Correct or reinstall {package_of(name)}.",
        ) from error


def _read_table(values: dict[Any, Any], table: type[BaseModel]) -> BaseModel:
    """Read a part's table; errors say the part's name as they do for a part of the kit."""
    try:
        return table.model_validate(values)
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            error.title, list(_renamed(values["name"], error))
        ) from error


def _renamed(name: str, error: ValidationError) -> Iterable[InitErrorDetails]:
    for each in error.errors(include_url=False):
        details = InitErrorDetails(type=each["type"], loc=(name, *each["loc"]), input=each["input"])
        if "ctx" in each:
            details["ctx"] = each["ctx"]
        yield details
