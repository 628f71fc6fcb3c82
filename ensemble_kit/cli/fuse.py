"""ensemble-kit fuse."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.cli.options import FILE, force_option, max_size_option
from ensemble_kit.workspace import FUSED, SELECTION


@click.command()
@click.argument("selection", type=FILE, default=SELECTION)
@click.option("-o", "--output", type=FILE, default=FUSED, show_default=True, help="File to write.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="bf16",
    show_default=True,
    help="The type that weights are stored in.",
)
@max_size_option
@force_option
def fuse(selection: Path, output: Path, dtype: Any, max_size: str, force: bool) -> None:
    """Fuse the members of SELECTION into one file that fits the size limit.

    SELECTION is ensemble/selection.json unless named. The file is compared with the members run
    one by one before it is kept.

    \b
    Example:
        ensemble-kit fuse --dtype bf16
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.files import format_size, parse_size
    from ensemble_kit.fusion import fuse as fuse_members

    fused = fuse_members(selection, output, dtype=dtype, max_size=parse_size(max_size), force=force)
    click.echo(
        f"{fused.path}: {len(fused.members)} members in {dtype}, {format_size(fused.num_bytes)} "
        f"of {format_size(fused.max_size)}.\n"
        f"Equal to its members; rounding to {dtype} moved no probability by more than "
        f"{fused.worst_change:.2g}."
    )
