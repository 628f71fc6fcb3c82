"""ensemble-kit select."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ensemble_kit.cli.options import EXISTING_FILE, FILE, force_option, json_option
from ensemble_kit.errors import SizeLimitError
from ensemble_kit.files import format_size, parse_size
from ensemble_kit.workspace import SELECTION


@click.command()
@click.argument("predictions", nargs=-1, type=EXISTING_FILE)
@click.option(
    "-o", "--output", type=FILE, default=SELECTION, show_default=True, help="File to write."
)
@click.option(
    "--max-size",
    metavar="SIZE",
    help="The most bytes all members may take: 1GiB, 1GB, 995MiB ...  [default: 1GiB]",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="bf16",
    show_default=True,
    help="The type that members will be fused in.",
)
@click.option(
    "--mixing",
    type=click.Choice(["uniform", "gap"]),
    default="uniform",
    show_default=True,
    help="How members are mixed: their mean, or each counted by its own GAP.",
)
@click.option("--labels", type=EXISTING_FILE, help="CSV of VideoId,Labels for the predictions.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="The k of GAP@k.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME=SIZE",
    help="The bytes of a CSV file's model, by the file's name without .csv; once for each.",
)
@force_option
@json_option
def select(
    predictions: tuple[Path, ...],
    output: Path,
    max_size: str | None,
    dtype: Any,
    mixing: Any,
    labels: Path | None,
    top_k: int,
    sizes: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Choose the members of an ensemble greedily, by validation GAP, under a size limit.

    PREDICTIONS are runs/*/validation.safetensors unless named; they may be CSV files in the
    challenge's format too.

    \b
    Examples:
        ensemble-kit select
        ensemble-kit select --max-size 500MB --mixing gap
        ensemble-kit select A.csv B.csv --labels Y.csv --size A=4MB --size B=7MB --max-size 10MB
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.selection import find_predictions
    from ensemble_kit.selection import select as select_members

    selection = select_members(
        predictions or find_predictions(),
        output=output,
        max_size=None if max_size is None else parse_size(max_size),
        dtype=dtype,
        mixing=mixing,
        labels_path=labels,
        top_k=top_k,
        sizes=_named_sizes(sizes),
        force=force,
    )
    if as_json:
        click.echo(selection.model_dump_json())
        return
    width = max(len("added"), *(len(step.added) for step in selection.path))
    click.echo(f"step  {'added':<{width}}  {f'GAP@{top_k}':>8}  {'gain':>8}  {'bytes':>14}   limit")
    before = 0.0
    for number, step in enumerate(selection.path, start=1):
        click.echo(
            f"{number:>4}  {step.added:<{width}}  {step.gap:>8.4f}  {step.gap - before:>+8.4f}  "
            f"{step.bytes:>14,}  {step.bytes / selection.max_size:>6.1%}"
        )
        before = step.gap
    click.echo(
        f"{output}: {len(selection.members)} of {len(selection.candidates)} candidates, "
        f"GAP@{top_k} {selection.gap:.4f}, {format_size(selection.bytes)} of "
        f"{format_size(selection.max_size)} in {dtype}."
    )


def _named_sizes(texts: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for text in texts:
        name, equals, size = text.rpartition("=")
        if not equals or name in sizes:
            raise SizeLimitError(
                f"{text!r} is {f'a second size of {name}' if equals else 'not a name and a size'}.",
                mend="Write NAME=SIZE once for each candidate: --size gru=4MB.",
            )
        sizes[name] = parse_size(size)
    return sizes
