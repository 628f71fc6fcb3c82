"""Published ensembles: strict reading of ``models/<paper>/ensembles.toml``.

One file for each paper names the recipes that its ensembles are made of, how their probabilities
are mixed, and what the source reports.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, get_args

from pydantic import Field, ValidationError

from ensemble_kit.choices import Mixing
from ensemble_kit.errors import RecipeError
from ensemble_kit.recipes.reading import ENSEMBLES, recipe_names, recipe_root
from ensemble_kit.recipes.tables import Count, SourceTable, Table
from ensemble_kit.texts import parse_toml
from ensemble_kit.validation import complaints, near


class ReportedGapTable(Table):
    """One figure that the source claims for an ensemble.

    ``repeats`` is how many draws of frames were averaged; left out where the source does not say.
    """

    gap_at_20: Annotated[float, Field(ge=0, le=1)]
    split: str
    repeats: Count | None = None


class EnsembleTable(Table):
    """One published ensemble.

    Either its members are known by name and mixing, or ``num_members`` is all that is published.
    """

    title: str
    members: Annotated[list[str], Field(min_length=2)] | None = None
    mixing: Mixing | None = None
    num_members: Annotated[int, Field(ge=2)] | None = None
    file_mib: Annotated[float, Field(gt=0)] | None = None
    reported: Annotated[list[ReportedGapTable], Field(min_length=1)]


class EnsemblesFile(Table):
    """The ensembles of one paper, by name."""

    source: SourceTable
    ensembles: Annotated[dict[str, EnsembleTable], Field(min_length=1)]


@dataclass(frozen=True)
class Ensemble:
    """A published ensemble.

    Attributes:
        name: The paper's folder and the ensemble's name, such as ``nonlocal/all-six``.
        source: Where it was read.
        table: What the file says of it; its members are shipped recipes.
    """

    name: str
    source: SourceTable
    table: EnsembleTable

    @property
    def num_members(self) -> int:
        """How many members it has, named or not."""
        return self.table.num_members or len(self.table.members or ())

    def named_members(self) -> list[str]:
        """Return the names of its members' recipes.

        Raises:
            RecipeError: The source does not say which they are.
        """
        if self.table.members is None:
            raise RecipeError(
                f"The source of ensemble {self.name} does not say which its "
                f"{self.num_members} members are.",
                hint="Choose another ensemble of `ensemble-kit recipes list --ensembles`, or name "
                "recipes.",
            )
        return self.table.members


def load_ensembles() -> list[Ensemble]:
    """Return all published ensembles: papers sorted, the ensembles of each as its file has them.

    Raises:
        RecipeError: A file is not TOML, a key or value is not what it must be, or a member is no
            shipped recipe.
    """
    known = recipe_names()
    ensembles = []
    for folder in sorted(recipe_root().iterdir(), key=lambda folder: folder.name):
        path = folder / ENSEMBLES
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            file = parse_ensembles(f"{folder.name}/{ENSEMBLES}", text, known)
            ensembles += [
                Ensemble(f"{folder.name}/{name}", file.source, table)
                for name, table in file.ensembles.items()
            ]
    return ensembles


def load_ensemble(name: str) -> Ensemble:
    """Return the published ensemble of this name, such as ``nonlocal/all-six``.

    Raises:
        RecipeError: There is none, or see ``load_ensembles``.
    """
    ensembles = {ensemble.name: ensemble for ensemble in load_ensembles()}
    if name not in ensembles:
        raise RecipeError(
            f"There is no ensemble {name!r}{near(name, list(ensembles))}.",
            hint="List the ensembles with `ensemble-kit recipes list --ensembles`.",
        )
    return ensembles[name]


def parse_ensembles(name: str, text: str, recipes: Sequence[str]) -> EnsemblesFile:
    """Check the text of an ensembles file.

    Args:
        name: The file's name, for messages.
        text: Its TOML.
        recipes: The names that members may have.

    Raises:
        RecipeError: See ``load_ensembles``.
    """
    try:
        file = EnsemblesFile.model_validate(parse_toml(text))
    except ValidationError as error:
        first = complaints(error, EnsemblesFile, owner="a published ensemble")[0]
        raise RecipeError(f"{name}: {first.problem}.", hint=first.hint) from error
    except ValueError as error:
        raise RecipeError(
            f"{name} is not TOML: {error}.", hint="Correct the file at that place."
        ) from error
    for key, ensemble in file.ensembles.items():
        _require_members(f"{name}: ensembles.{key}", ensemble, recipes)
    return file


def _require_members(place: str, ensemble: EnsembleTable, recipes: Sequence[str]) -> None:
    members = ensemble.members
    if (members is None) == (ensemble.num_members is None):
        what = "neither members nor" if members is None else "both members and"
        raise RecipeError(
            f"{place} has {what} num_members.",
            hint="Name the members, or give num_members where their names are not published.",
        )
    if members is not None and ensemble.mixing is None:
        *others, last = get_args(Mixing)
        raise RecipeError(
            f"{place} has members, but no mixing.",
            hint=f"Give it one: mixing = {', '.join(others)} or {last}.",
        )
    for member in members or ():
        if member not in recipes:
            raise RecipeError(
                f"{place}.members has {member!r}, which is no shipped recipe"
                f"{near(member, recipes)}.",
                hint="Name recipes of `ensemble-kit recipes list`.",
            )
        if (members or ()).count(member) > 1:
            raise RecipeError(
                f"{place}.members has {member!r} twice.", hint="Name each member once."
            )


def ensembles_json_schema() -> str:
    """Return the JSON Schema of ensembles files, which editors use to complete them."""
    return json.dumps(EnsemblesFile.model_json_schema(), indent=2)
