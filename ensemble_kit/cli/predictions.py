"""ensemble-kit predictions merge."""

from pathlib import Path

import click

from ensemble_kit.cli.options import (
    FILE,
    echo_json,
    force_option,
    json_option,
)


@click.group()
def predictions() -> None:
    """Make one predictions file of several."""


@predictions.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=FILE, required=True, help="A .safetensors file, or a challenge .csv."
)
@click.option(
    "--top-k", type=click.IntRange(min=1), help="Classes of each video in a .csv of a folder."
)
@force_option
@json_option
def merge(
    sources: tuple[Path, ...], output: Path, top_k: int | None, force: bool, as_json: bool
) -> None:
    """Write a folder of predictions, or the predictions of all folds of a recipe, as one file.

    SOURCES is one folder that `ensemble-kit predict` wrote; or the validation predictions of each
    run that `ensemble-kit train --fold` trained, for `select`.

    \b
    Examples:
        ensemble-kit predictions merge test/ -o submission.csv
        ensemble-kit predictions merge folds/gru-fold-*/validation.safetensors \\
            -o folds/gru.safetensors
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.predictions.folds import merge_folds
    from ensemble_kit.predictions.merging import merge as merge_folder

    if len(sources) == 1:
        path = merge_folder(sources[0], output, top_k=top_k, force=force)
    elif top_k is not None:
        raise click.UsageError(
            "--top-k goes with a folder; merged folds keep the classes that they have."
        )
    else:
        path = merge_folds(sources, output, force=force)
    if as_json:
        echo_json({"path": path})
        return
    click.echo(path)
