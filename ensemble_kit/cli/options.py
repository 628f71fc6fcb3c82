"""Arguments and options that several commands share. Imports click only."""

from pathlib import Path

import click

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

force_option = click.option("--force", is_flag=True, help="Replace what exists already.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
