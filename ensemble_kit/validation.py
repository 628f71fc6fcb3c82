"""What pydantic refuses, in the kit's words.

pydantic says what each branch of a union would have wanted, in its own terms and in its own order.
A person wants the one complaint that explains the others, the place as the file writes it, and the
key that was probably meant. Recipes, schemas, selections and the metadata of files all say it by
these functions.
"""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ensemble_kit.errors import shown

WANTED = ": Input should be "
WRONG_BRANCH = 2  # the rank of a complaint about a type that the value was not meant to have


class Complaint(NamedTuple):
    """One thing that is wrong: the two halves of an error, ``problem`` without its full stop."""

    problem: str
    hint: str


def complaints(
    error: ValidationError,
    model: type[BaseModel],
    *,
    owner: str,
    own_tables: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> list[Complaint]:
    """Return all that is wrong with some values, the most telling first, each once.

    Args:
        error: What pydantic raised.
        model: What the values were read as.
        owner: What they are, for the message: ``a recipe``.
        own_tables: Tables of other packages' parts that the values name, by the parts' names.
    """
    ordered = sorted(error.errors(), key=_rank)
    told = [each["loc"] for each in ordered if _rank(each) < WRONG_BRANCH]
    return _joined(
        [
            _complaint(each, model, owner, own_tables)
            for each in ordered
            if _rank(each) < WRONG_BRANCH
            # the other branch of the union has said what is wrong
            or not any(each["loc"][:-1] == place[: len(each["loc"]) - 1] for place in told)
        ]
    )


def _joined(found: Sequence[Complaint]) -> list[Complaint]:
    """Return each complaint once, and as one what several branches of a union say of a value."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for problem, hint in found:
        what, _, expected = problem.partition(WANTED)
        wanted.setdefault((what, hint), []).append(expected)
    return [
        Complaint(what + WANTED + " or ".join(dict.fromkeys(each)) if any(each) else what, hint)
        for (what, hint), each in wanted.items()
    ]


def near(word: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)``, or nothing where no known word is like this one."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _complaint(
    detail: Any, model: type[BaseModel], owner: str, own_tables: Mapping[str, type[BaseModel]]
) -> Complaint:
    table, place = _walk(detail["loc"], model, own_tables)
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        known = list(table.model_fields)
        tag = next((name for name, own in own_tables.items() if own is table), _tag(table))
        what = f"the part {tag!r}" if tag else owner
        problem = f"{place} is not a key of {what}{near(str(detail['loc'][-1]), known)}"
        return Complaint(problem, f"Use one of the keys: {', '.join(known)}.")
    if kind == "missing":
        return Complaint(f"{place} is missing", f"Give {place} a value.")
    if kind == "union_tag_not_found":
        return Complaint(f"{place}.name is missing", f"Name the part to use as {place}.")
    if kind == "union_tag_invalid":
        expected = [tag.strip("'") for tag in detail["ctx"]["expected_tags"].split(", ")]
        name = value["name"] if isinstance(value, dict) else detail["ctx"]["tag"]
        problem = f"{place} has name {shown(name)}{near(str(name), expected)}"
        return Complaint(problem, f"Name one of: {', '.join(expected)}.")
    is_table = kind in {"model_type", "model_attributes_type", "dict_type"}
    wanted = "Input should be a table" if is_table else detail["msg"].removeprefix("Value error, ")
    if not place:
        return Complaint(wanted, "Correct the file.")
    hint = f"Give {place} a value of the right type and range."
    return Complaint(f"{place} is {shown(value)}: {wanted}", hint)


def _rank(detail: Any) -> int:
    """Order complaints: a misspelt key says more than that the right one is missing."""
    if detail["type"] == "extra_forbidden":
        return 0
    # a table by modality is not a number, but what matters is what is wrong within it
    is_wrong_branch = detail["type"] == "int_type" and isinstance(detail["input"], dict)
    return WRONG_BRANCH if is_wrong_branch else 1


def _walk(
    location: tuple[int | str, ...],
    root: type[BaseModel],
    own_tables: Mapping[str, type[BaseModel]],
) -> tuple[type[BaseModel], str]:
    """Return the table that a complaint is about, and its place without pydantic's own words."""
    table = root
    place = ""
    choices: dict[str, type[BaseModel]] = {}
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
            continue
        if part in own_tables:
            table, choices = own_tables[part], {}
            continue
        if part in choices:
            table, choices = choices[part], {}
            continue
        if part in table.model_fields:
            members = _models_in(table.model_fields[part].annotation)
            choices = {tag: model for model in members if (tag := _tag(model))}
            if len(members) == 1:
                table = members[0]
        elif part in {"constrained-int", "dict[str,constrained-int]"}:
            continue  # which branch of a union pydantic tried
        place += f".{part}" if place else part
    return table, place


def _tag(table: type[BaseModel]) -> str | None:
    """Return the name that a recipe picks a part by; None for a table that is no part."""
    field = table.model_fields.get("name")
    values = get_args(field.annotation) if field else ()
    return str(values[0]) if values and isinstance(values[0], str) else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for part in get_args(annotation) for model in _models_in(part)]
