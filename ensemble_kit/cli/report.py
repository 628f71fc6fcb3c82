"""ensemble-kit report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import TOP_K
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    FILE,
    echo_csv,
    echo_skipped,
    force_option,
    records_options,
    table_options,
)
from ensemble_kit.files import refuse_overwrite, require_suffix
from ensemble_kit.store.workspace import REPORT, SELECTION
from ensemble_kit.wording import printable, printable_line

if TYPE_CHECKING:
    from ensemble_kit.report.row import Row


@click.command()
@click.argument("data", nargs=-1)
@click.option(
    "--selection",
    type=EXISTING_FILE,
    help=f"Selection to show  [default: {SELECTION}, if it exists].",
)
@click.option(
    "--calibrated",
    type=EXISTING_FILE,
    help="Exported file that `ensemble-kit calibrate` wrote, whose reliability diagram to show.",
)
@click.option(
    "--timeline",
    type=EXISTING_FILE,
    help=".jsonl file that `ensemble-kit predict --window` wrote, whose first videos to show over "
    "time.",
)
@click.option("-o", "--output", type=FILE, default=REPORT, show_default=True, help="Page to write.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=TOP_K,
    show_default=True,
    help="Number of classes of each video that GAP counts.",
)
@records_options
@force_option
@table_options
def report(
    data: tuple[str, ...],
    selection: Path | None,
    calibrated: Path | None,
    timeline: Path | None,
    output: Path,
    top_k: int,
    force: bool,
    as_json: bool,
    as_csv: bool,
    **reading: Any,
) -> None:
    """Write the selection of this workspace as one HTML page that opens anywhere, offline.

    With records as DATA, every model of the workspace is scored on them too: the last checkpoint
    and the averaged checkpoint of each run, and the fused and exported ensemble. The table is
    printed, and added to the page if there is a selection.

    \b
    Examples:
        ensemble-kit report
        ensemble-kit report 'test/*.tfrecord' --force
        ensemble-kit report --calibrated ensemble/calibrated.onnx --timeline windows.jsonl --force
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    if as_csv and not data:
        raise click.UsageError("--csv prints the scores of models on records; name these as DATA.")
    if selection is None and (isfile(SELECTION) or not data):
        selection = SELECTION
    if selection is not None:
        require_suffix(output, ".html")
        refuse_overwrite(output, force=force)  # before minutes of work
    rows = _scored(data, top_k, reading) if data else []
    if selection is not None:
        from ensemble_kit.report.page import write_report

        write_report(
            selection, output, rows=rows, calibrated=calibrated, timeline=timeline, force=force
        )
    page = None if selection is None else output
    if as_json:
        models = [asdict(row) for row in rows]
        click.echo(json.dumps({"page": page and str(page), "models": models}, indent=2))
        return
    if as_csv:
        echo_csv(asdict(row) for row in rows)
        return
    if rows:
        _echo_table(rows)
    click.echo(
        printable(f"{page}: open it in a browser.")
        if page
        else f"No page was written, for {SELECTION} does not exist."
    )


def _scored(data: Sequence[str], top_k: int, reading: dict[str, Any]) -> "list[Row]":
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.report.scores import score_models

    records = Records(data, **reading)
    rows = score_models(Path(), records, k=top_k)
    echo_skipped(records)
    return rows


def _echo_table(rows: "Sequence[Row]") -> None:
    names = [printable_line(row.model) for row in rows]
    width = max(len("model"), *map(len, names))
    gap = f"GAP@{rows[0].k}"
    click.echo(f"{'model':<{width}}  {'form':<15}  repeats  {gap:>7}   Hit@1         bytes")
    for name, row in zip(names, rows, strict=True):
        click.echo(
            f"{name:<{width}}  {row.form:<15}  {row.repeats:>7}  {row.gap:7.4f}  "
            f"{row.hit_at_1:6.4f}  {row.num_bytes:>12,}"
        )
