"""ensemble-kit runs."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble_kit.cli.options import FOLDER, echo_csv, table_options
from ensemble_kit.wording import printable_line

if TYPE_CHECKING:
    from ensemble_kit.store.runs import RunSummary

COLOURS = {"running": "cyan", "stopped": "yellow", "failed": "red", "finished": "green",
           "foreign": "magenta"}  # fmt: skip
WIDEST = 1000  # columns where the output is no terminal, so that nothing is cut off


@click.command()
@click.argument("folder", type=FOLDER, default=Path())
@table_options
def runs(folder: Path, as_json: bool, as_csv: bool) -> None:
    """List the runs of the workspace FOLDER with their state, GAP, size and steps.

    FOLDER may also be a folder of runs, such as `train -o` makes. GAPs are those of the best
    checkpoint and of the averaged one on the validation records.

    \b
    Example:
        ensemble-kit runs
        ensemble-kit runs --json | jq '.[] | select(.state == "failed")'
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.store.runs import list_runs

    found = list_runs(folder)
    if as_json:
        click.echo(json.dumps([asdict(run) for run in found], indent=2))
    elif as_csv:
        echo_csv(asdict(run) for run in found)
    else:
        _print_table(found)


def _print_table(found: "list[RunSummary]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ensemble_kit.files import format_size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("run", "recipe"):
        table.add_column(heading, overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("steps", "best GAP", "averaged", "parameters", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in found:
        table.add_row(
            escape(printable_line(run.name)),
            escape(printable_line(run.recipe or "-")),
            f"[{COLOURS[run.state]}]{run.state}",
            f"{run.steps:,}",
            "-" if run.best_gap is None else f"{run.best_gap:.4f}",
            "-" if run.averaged_gap is None else f"{run.averaged_gap:.4f}",
            "-" if run.parameters is None else f"{run.parameters:,}",
            "-" if run.num_bytes is None else format_size(run.num_bytes),
        )
    Console(width=None if sys.stdout.isatty() else WIDEST).print(table)
