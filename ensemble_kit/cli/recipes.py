"""ensemble-kit recipes: list, show, copy, new, check, schema."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ensemble_kit.choices import PUBLISHED_NAME, Published
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    FILE,
    SuggestingGroup,
    complete_recipes,
    echo_csv,
    echo_json,
    force_option,
    json_option,
    table_options,
)
from ensemble_kit.errors import RecipeError
from ensemble_kit.store.dtypes import BY_NAME
from ensemble_kit.wording import printable_line

if TYPE_CHECKING:
    from ensemble_kit.networks.catalogue import EnsembleEntry, Entry


@click.group(cls=SuggestingGroup)
def recipes() -> None:
    """List, show, copy, begin and check recipes.

    \b
    Example:
        ensemble-kit recipes list
        ensemble-kit recipes show willow/gru --json
        ensemble-kit recipes copy willow/gru my-gru.toml
    """  # noqa: D301 - \b is click's mark for "keep these lines"


@recipes.command("list")
@click.option("--paper", metavar="TEXT", help="Only of this paper: a folder, or words of it.")
@click.option("--part", metavar="NAME", help="Only those with this part, such as netvlad.")
@click.option("--ensembles", is_flag=True, help="List published ensembles of recipes instead.")
@table_options
def list_recipes(
    paper: str | None, part: str | None, ensembles: bool, as_json: bool, as_csv: bool
) -> None:
    """List the shipped recipes: sizes for YouTube-8M of 2018, and what their papers report.

    \b
    Example:
        ensemble-kit recipes list --paper willow --part context_gating
        ensemble-kit recipes list --ensembles
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.published import PUBLISHED
    from ensemble_kit.networks.catalogue import list_ensembles
    from ensemble_kit.networks.catalogue import list_recipes as list_entries

    schema = PUBLISHED[PUBLISHED_NAME]
    if ensembles:
        if part is not None:
            raise click.UsageError("--part selects recipes; leave it or --ensembles out.")
        _echo_ensembles(list_ensembles(schema, paper=paper), as_json, as_csv)
        return
    entries = list_entries(schema, paper=paper, part=part)
    if as_json:
        click.echo(json.dumps([_as_json(entry) for entry in entries], indent=2))
        return
    if as_csv:
        echo_csv(map(_as_row, entries))
        return
    width = max(len(entry.recipe.name) for entry in entries)
    click.echo(
        f"{'name':<{width}}  {'paper':<16}   parameters  MiB in bf16  {'GAP@20':<7}  reported on"
    )
    for entry in entries:
        reported = entry.recipe.reported
        gap = f"{reported.gap_at_20:g}" if reported and reported.gap_at_20 else "-"
        split = reported.split if reported and reported.split else "-"
        click.echo(
            f"{entry.recipe.name:<{width}}  {entry.paper:<16}  {entry.size.parameters:>11,}  "
            f"{_bytes(entry.size.values)['bf16'] / 2**20:>11.1f}  {gap:<7}  {split}"
        )


def _as_row(entry: "Entry") -> dict[str, object]:
    recipe, reported = entry.recipe, entry.recipe.reported
    return {
        "name": recipe.name,
        "paper": entry.paper,
        "parameters": entry.size.parameters,
        "bytes_in_bf16": _bytes(entry.size.values)["bf16"],
        "gap_at_20": reported and reported.gap_at_20,
        "reported_on": reported and reported.split,
    }


def _echo_ensembles(entries: Sequence["EnsembleEntry"], as_json: bool, as_csv: bool) -> None:
    if as_json:
        click.echo(json.dumps([_ensemble_as_json(entry) for entry in entries], indent=2))
        return
    if as_csv:
        echo_csv(row for entry in entries for row in _ensemble_rows(entry))
        return
    width = max(len(entry.ensemble.name) for entry in entries)
    click.echo(
        f"{'name':<{width}}  {'paper':<16}  members  {'mixing':<7}  MiB in bf16  repeats  "
        f"{'GAP@20':<7}  reported on"
    )
    for entry in entries:
        table = entry.ensemble.table
        size = f"{_bytes(entry.values)['bf16'] / 2**20:.1f}" if entry.values else "-"
        for reported in table.reported:
            click.echo(
                f"{entry.ensemble.name:<{width}}  {entry.paper:<16}  "
                f"{entry.ensemble.num_members:>7}  {table.mixing or '-':<7}  {size:>11}  "
                f"{reported.repeats or '-':>7}  {reported.gap_at_20:<7g}  {reported.split}"
            )


def _bytes(values: int) -> dict[str, int]:
    """Return the bytes that some stored numbers take, by their type."""
    return {name: values * BY_NAME[name].num_bytes for name in ("fp32", "bf16")}


def _ensemble_rows(entry: "EnsembleEntry") -> Iterator[dict[str, object]]:
    table = entry.ensemble.table
    for reported in table.reported:
        yield {
            "name": entry.ensemble.name,
            "paper": entry.paper,
            "members": entry.ensemble.num_members,
            "mixing": table.mixing,
            "bytes_in_bf16": _bytes(entry.values)["bf16"] if entry.values else None,
            "repeats": reported.repeats,
            "gap_at_20": reported.gap_at_20,
            "reported_on": reported.split,
        }


def _ensemble_as_json(entry: "EnsembleEntry") -> dict[str, Any]:
    ensemble, values = entry.ensemble, entry.values
    return {
        "name": ensemble.name,
        "title": ensemble.table.title,
        "paper": ensemble.source.paper,
        "members": ensemble.table.members,
        "num_members": ensemble.num_members,
        "mixing": ensemble.table.mixing,
        "values": values,
        "bytes": _bytes(values) if values else None,
        "file_mib": ensemble.table.file_mib,
        "reported": [row.model_dump(exclude_none=True) for row in ensemble.table.reported],
    }


def _as_json(entry: "Entry") -> dict[str, Any]:
    recipe = entry.recipe
    return {
        "name": recipe.name,
        "title": recipe.title,
        "paper": recipe.source and recipe.source.paper,
        "parts": entry.parts,
        "parameters": entry.size.parameters,
        "values": entry.size.values,
        "bytes": _bytes(entry.size.values),
        "reported": recipe.reported.model_dump(exclude_none=True) if recipe.reported else None,
    }


@recipes.command()
@click.argument("recipe", shell_complete=complete_recipes)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a value of it.")
@click.option(
    "--schema",
    type=click.Path(dir_okay=False),
    default=PUBLISHED_NAME,
    show_default=True,
    help=f"{', '.join(get_args(Published))}, or a schema.toml.",
)
@json_option
def show(recipe: str, overrides: tuple[str, ...], schema: str, as_json: bool) -> None:
    """Show a RECIPE's text, or with --json its values, parameters and bytes for a schema.

    \b
    Example:
        ensemble-kit recipes show nonlocal/soft-bof-4k --json --schema youtube8m-2018
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.published import named_schema
    from ensemble_kit.recipes.reading import load_recipe

    loaded = load_recipe(recipe, overrides)
    if not as_json:
        click.echo(loaded.metadata.text.rstrip())
        return
    from ensemble_kit.networks.building import measure_recipe

    size = measure_recipe(loaded, named_schema(schema))
    about = {
        "name": loaded.name,
        "overrides": list(overrides),
        "schema": schema,
        "parameters": size.parameters,
        "values": size.values,
        "bytes": _bytes(size.values),
        "recipe": loaded.model_dump(exclude_none=True),
    }
    click.echo(json.dumps(about, indent=2))


@recipes.command()
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("output", type=FILE)
@force_option
@json_option
def copy(recipe: str, output: Path, force: bool, as_json: bool) -> None:
    """Copy the text of RECIPE to the file OUTPUT, to be changed there.

    \b
    Example:
        ensemble-kit recipes copy willow/gru my-gru.toml
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.files import require_suffix, written_aside
    from ensemble_kit.recipes.reading import read_recipe_text

    require_suffix(output, ".toml")
    with written_aside(output, force=force) as aside:
        aside.write_text(read_recipe_text(recipe).text, encoding="utf-8")
    if as_json:
        echo_json({"path": output, "recipe": recipe})
        return
    click.echo(output)


@recipes.command()
@click.argument("output", type=FILE)
@force_option
@json_option
def new(output: Path, force: bool, as_json: bool) -> None:
    """Write a small recipe with comments to OUTPUT: every table, and the parts to choose from.

    \b
    Example:
        ensemble-kit recipes new my-recipe.toml
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.files import require_suffix, written_aside
    from ensemble_kit.recipes.reading import recipe_template

    require_suffix(output, ".toml")
    with written_aside(output, force=force) as aside:
        aside.write_text(recipe_template(), encoding="utf-8")
    if as_json:
        echo_json({"path": output})
        return
    click.echo(output)


@recipes.command()
@click.argument("paths", nargs=-1, required=True, type=EXISTING_FILE, metavar="FILE...")
@json_option
def check(paths: tuple[Path, ...], as_json: bool) -> None:
    """Check that each FILE is a recipe, and name all problems of those that are not.

    \b
    Example:
        ensemble-kit recipes check my-gru.toml
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.recipes.reading import load_recipe, recipe_errors

    errors = {path: recipe_errors(str(path)) for path in paths}
    if as_json:
        found = [
            {
                "file": str(path),
                "problems": [{"problem": each.problem, "hint": each.hint} for each in problems],
            }
            for path, problems in errors.items()
        ]
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for path, problems in errors.items():
            if not problems:
                click.echo(printable_line(f"{path}: {load_recipe(str(path)).title}"))
    _refuse([error for problems in errors.values() for error in problems])


def _refuse(errors: "Sequence[RecipeError]") -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = [f"{error.problem} {error.hint}" for error in errors]
        raise RecipeError(
            "\n".join([f"There are {len(errors)} problems.", *lines]),
            hint="Correct them, and check again.",
        )


@recipes.command()
@click.option("--ensembles", is_flag=True, help="Print that of ensembles.toml instead.")
@click.option("--json", is_flag=True, expose_value=False, help="Changes nothing: it is JSON.")
def schema(ensembles: bool) -> None:
    """Print the JSON Schema of recipes, for editors.

    \b
    Example:
        ensemble-kit recipes schema > recipe.schema.json
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.recipes.ensembles import ensembles_json_schema
    from ensemble_kit.recipes.reading import recipe_json_schema

    click.echo(ensembles_json_schema() if ensembles else recipe_json_schema())
