"""ensemble-kit report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ensemble_kit.cli.options import echo_skipped, json_option, records_options


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(min=1), default=20, show_default=True)
@records_options
@json_option
def report(data: tuple[str, ...], top_k: int, as_json: bool, **reading: Any) -> None:
    """Score every model of this workspace on the records DATA, in one table.

    Runs are scored by their last checkpoint and averaged; the ensemble fused and exported.

    \b
    Example:
        ensemble-kit report 'test/*.tfrecord'
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.report import report as report_models

    records = Records(data, **reading)
    rows = report_models(Path(), records, k=top_k)
    echo_skipped(records)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    width = max(len("model"), *(len(row.model) for row in rows))
    gap = f"GAP@{top_k}"
    click.echo(f"{'model':<{width}}  {'form':<15}  repeats  {gap:>7}   Hit@1         bytes")
    for row in rows:
        click.echo(
            f"{row.model:<{width}}  {row.form:<15}  {row.repeats:>7}  {row.gap:7.4f}  "
            f"{row.hit_at_1:6.4f}  {row.num_bytes:>12,}"
        )
