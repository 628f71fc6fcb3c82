"""ensemble-kit average."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.cli.options import (
    EXISTING_FILE_OR_FOLDER,
    FILE,
    echo_skipped,
    force_option,
    records_options,
)


@click.command()
@click.argument(
    "run", nargs=-1, required=True, metavar="RUN|CHECKPOINTS...",
    type=EXISTING_FILE_OR_FOLDER,
)  # fmt: skip
@click.option(
    "-o", "--output", type=FILE, help="File to write [default: RUN/averaged.safetensors]."
)
@click.option("--last", type=click.IntRange(min=1), help="How many of a run's last checkpoints.")
@click.option("--from-step", type=click.IntRange(min=0), default=0, help="Leave out earlier steps.")
@click.option(
    "--batch-norm",
    type=click.Choice(["recalibrate", "average", "last"]),
    default="recalibrate",
    show_default=True,
    help="Where batch-norm statistics come from.",
)
@click.option("--data", multiple=True, metavar="GLOB", help="Records to recalibrate on.")
@records_options
@force_option
def average(
    run: tuple[Path, ...],
    output: Path | None,
    last: int | None,
    from_step: int,
    batch_norm: Any,
    data: tuple[str, ...],
    force: bool,
    **reading: Any,
) -> None:
    """Average the last checkpoints of a RUN, or the CHECKPOINTS named, into one.

    \b
    Example:
        ensemble-kit average runs/willow-gru --last 5 --force
        ensemble-kit average runs/gru/checkpoints/step-*.safetensors -o gru.safetensors
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.averaging import average_checkpoints
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.pipeline import average_run
    from ensemble_kit.workspace import RunFolder

    if len(run) > 1 and any(path.is_dir() for path in run):
        raise click.UsageError("Name one RUN, or the CHECKPOINTS of one.")
    training = Records(data, **reading) if data else None
    if len(run) == 1 and run[0].is_dir():
        folder = RunFolder(run[0])
        output = output or folder.averaged
        chosen = average_run(
            folder,
            output,
            last=last,
            from_step=from_step,
            batch_norm=batch_norm,
            training=training,
            force=force,
        )
    else:
        if output is None:
            raise click.UsageError("Name the file to write with -o.")
        chosen = list(run)
        average_checkpoints(chosen, output, batch_norm=batch_norm, training=training, force=force)
    click.echo(f"{output}: the mean of {len(chosen)} checkpoints, batch norm {batch_norm}.")
    if training is not None:
        echo_skipped(training)
