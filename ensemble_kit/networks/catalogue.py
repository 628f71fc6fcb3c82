"""The catalogue: the shipped recipes with their parts and sizes, and the published ensembles."""

from collections.abc import Sequence
from dataclasses import dataclass

from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import RecipeError
from ensemble_kit.networks.building import Size, measure_recipe
from ensemble_kit.recipes.ensembles import Ensemble, load_ensembles
from ensemble_kit.recipes.reading import AnyRecipe, ModelRecipe, load_recipe, recipe_names


@dataclass(frozen=True)
class Entry:
    """One recipe of the catalogue.

    Attributes:
        recipe: The recipe.
        size: Its size when it is built for the requested schema.
    """

    recipe: AnyRecipe
    size: Size

    @property
    def paper(self) -> str:
        """The paper without its section and table, such as ``arXiv:1706.06905``."""
        return _paper_of(self.recipe).partition(",")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts, in the order of the wiring."""
        return parts_of(self.recipe)


@dataclass(frozen=True)
class EnsembleEntry:
    """One published ensemble of the catalogue.

    Attributes:
        ensemble: The ensemble.
        values: How many numbers its members hold together, batch-norm statistics included, built
            for the schema that was asked for; None where its members are not published.
    """

    ensemble: Ensemble
    values: int | None

    @property
    def paper(self) -> str:
        """The paper without its section and table, such as ``arXiv:1706.06905``."""
        return _paper_of(self.ensemble).partition(",")[0]


def list_recipes(
    schema: Schema, *, paper: str | None = None, part: str | None = None
) -> list[Entry]:
    """Return the shipped recipes, sorted by name.

    Args:
        schema: The schema to build them for when they are measured.
        paper: Only recipes whose source contains this text, in upper or lower case, or whose folder
            has this name.
        part: Only recipes with this part.

    Raises:
        RecipeError: No recipe matches.
    """
    recipes = [load_recipe(name) for name in recipe_names()]
    left = [recipe for recipe in recipes if paper is None or _is_from(recipe, paper)]
    if not left:
        folders = dict.fromkeys(recipe.name.partition("/")[0] for recipe in recipes)
        raise RecipeError(
            f"No recipe is from {paper!r}.",
            hint=f"Name a folder ({', '.join(folders)}) or a part of a paper's reference.",
        )
    chosen = [recipe for recipe in left if part is None or part in parts_of(recipe)]
    if not chosen:
        among = "" if paper is None else f" from {paper!r}"
        raise RecipeError(
            f"No recipe{among} has the part {part!r}.", hint=f"Name one of: {_all_parts(left)}."
        )
    return [Entry(recipe, measure_recipe(recipe, schema)) for recipe in chosen]


def list_ensembles(schema: Schema, *, paper: str | None = None) -> list[EnsembleEntry]:
    """Return the published ensembles, by paper and in the order of its file.

    Args:
        schema: What to build their members for when they are measured.
        paper: Only ensembles whose source holds this text, in any case, or whose folder it is.

    Raises:
        RecipeError: No ensemble is left, or a file of ensembles is not what it must be.
    """
    ensembles = load_ensembles()
    chosen = [each for each in ensembles if paper is None or _is_from(each, paper)]
    if not chosen:
        folders = dict.fromkeys(each.name.partition("/")[0] for each in ensembles)
        raise RecipeError(
            f"No ensemble is from {paper!r}.",
            hint=f"Name a folder ({', '.join(folders)}) or a part of a paper's reference.",
        )
    members = {name for each in chosen for name in each.table.members or ()}
    values = {name: measure_recipe(load_recipe(name), schema).values for name in members}
    return [
        EnsembleEntry(each, sum(values[name] for name in each.table.members or ()) or None)
        for each in chosen
    ]


def parts_of(recipe: AnyRecipe) -> tuple[str, ...]:
    """Return the names of a recipe's parts, in the order of the wiring."""
    if isinstance(recipe, ModelRecipe):
        return (recipe.model.name,)
    names: list[str] = [recipe.sampling.name, recipe.pooling.name]
    if getattr(recipe.pooling, "non_local", None) is not None:
        names.append("non_local")
    if recipe.fusion is not None:
        names.append(recipe.fusion.name)
    elif recipe.pooling.modality_fusion == "late":
        names.append("concat")
    if recipe.hidden is not None and recipe.hidden.gating_name != "none":
        names.append(recipe.hidden.gating_name)
    names.append(recipe.head.name)
    if recipe.head.probability_gating:
        names.append("probability_gating")
    return tuple(names)


def _is_from(shipped: AnyRecipe | Ensemble, paper: str) -> bool:
    return paper.lower() in _paper_of(shipped).lower() or paper == shipped.name.partition("/")[0]


def _paper_of(shipped: AnyRecipe | Ensemble) -> str:
    return shipped.source.paper if shipped.source is not None else "-"


def _all_parts(recipes: Sequence[AnyRecipe]) -> str:
    return ", ".join(sorted({name for recipe in recipes for name in parts_of(recipe)}))
