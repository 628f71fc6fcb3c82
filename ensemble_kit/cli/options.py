"""Arguments and options that several commands share. Imports click only."""

from pathlib import Path

import click

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

force_option = click.option("--force", is_flag=True, help="Replace what exists already.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True
)
repeats_option = click.option(
    "--repeats", type=click.IntRange(min=1), help="Random frame samples averaged  [default: 1]."
)
max_size_option = click.option(
    "--max-size",
    default="1GiB",
    show_default=True,
    metavar="SIZE",
    help="The most the file may have: 1GiB is 2^30 bytes, 1GB 10^9, 995MiB ...",
)
