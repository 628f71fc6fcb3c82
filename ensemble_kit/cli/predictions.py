"""ensemble-kit predictions merge."""

from pathlib import Path

import click

from ensemble_kit.cli.options import FILE, FOLDER, echo_json, force_option, json_option


@click.group()
def predictions() -> None:
    """Work with predictions that `ensemble-kit predict` wrote to a folder."""


@predictions.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "-o", "--output", type=FILE, required=True, help="A .safetensors file, or a challenge .csv."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Classes of each video in a .csv.")
@force_option
@json_option
def merge(folder: Path, output: Path, top_k: int | None, force: bool, as_json: bool) -> None:
    """Write the predictions of FOLDER as one file.

    \b
    Example:
        ensemble-kit predictions merge test/ -o submission.csv
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.predictions.merging import merge as merge_folder

    path = merge_folder(folder, output, top_k=top_k, force=force)
    if as_json:
        echo_json({"path": path})
        return
    click.echo(path)
