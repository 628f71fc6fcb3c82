"""ensemble-kit average."""

from os.path import isdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import BATCH_NORM_RULE, METHOD, BatchNormRule, Method
from ensemble_kit.cli.options import (
    EXISTING_FILE_OR_FOLDER,
    FILE,
    device_option,
    echo_json,
    echo_skipped,
    force_option,
    json_option,
    one_of,
    records_options,
)
from ensemble_kit.store.workspace import RunFolder

if TYPE_CHECKING:
    from ensemble_kit.averaging.stage import AveragedRun


@click.command()
@click.argument(
    "run", nargs=-1, required=True, metavar="RUN|CHECKPOINTS...",
    type=EXISTING_FILE_OR_FOLDER,
)  # fmt: skip
@click.option(
    "-o",
    "--output",
    type=FILE,
    help=f"File to write  [default: {RunFolder(Path('RUN')).averaged}].",
)
@click.option(
    "--method",
    type=one_of(Method),
    default=METHOD,
    show_default=True,
    help="uniform averages all; greedy those that raise the validation GAP@20; ema takes the "
    "moving average.",
)
@click.option(
    "--last", type=click.IntRange(min=1),
    help="How many of a RUN's last checkpoints  [default: as in its recipe; all for greedy].",
)  # fmt: skip
@click.option(
    "--from-step",
    type=click.IntRange(min=0),
    help="Leave out checkpoints of a RUN's earlier steps.",
)
@click.option(
    "--batch-norm",
    type=one_of(BatchNormRule),
    default=BATCH_NORM_RULE,
    show_default=True,
    help="recalibrate estimates statistics again; average averages them, or keeps those of ema; "
    "last takes those of the last step.",
)
@click.option("--data", multiple=True, metavar="GLOB", help="Records to recalibrate on.")
@click.option(
    "--validation", multiple=True, metavar="GLOB",
    help="Records to compare GAP@20 on  [default: the run's, if they still exist].",
)  # fmt: skip
@click.option(
    "--even-if-worse", is_flag=True, help="Write the average even if a single checkpoint is better."
)
@device_option
@records_options
@force_option
@json_option
def average(
    run: tuple[Path, ...],
    output: Path | None,
    method: Any,
    last: int | None,
    from_step: int | None,
    batch_norm: Any,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    even_if_worse: bool,
    device: str,
    force: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Average the last checkpoints of a RUN, or the CHECKPOINTS named, into one.

    If there are validation records, the average is written only if its GAP@20 is at least that of
    the best single checkpoint.

    \b
    Example:
        ensemble-kit average runs/willow-gru --last 5 --force
        ensemble-kit average runs/willow-gru --method greedy -o greedy.safetensors
        ensemble-kit average runs/gru/checkpoints/step-*.safetensors -o gru.safetensors
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.averaging.stage import average_checkpoints
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.pipeline import average_run

    is_run = len(run) == 1 and isdir(run[0])
    if not is_run and any(isdir(path) for path in run):
        raise click.UsageError("Name one RUN, or the CHECKPOINTS of one run.")
    if (last or from_step) and (not is_run or method == "ema"):
        raise click.UsageError("--last and --from-step choose among the checkpoints of a RUN.")
    if not is_run and output is None:
        raise click.UsageError("Name the file to write with -o.")
    training = Records(data, **reading) if data else None
    comparison = Records(validation, **reading) if validation else None
    options: dict[str, Any] = {
        "method": method,
        "batch_norm": batch_norm,
        "training": training,
        "validation": comparison,
        "even_if_worse": even_if_worse,
        "device": device,
        "force": force,
    }
    if is_run:
        folder = RunFolder(run[0])
        outcome = average_run(
            folder, output or folder.averaged, last=last, from_step=from_step or 0, **options
        )
    elif output is not None:
        outcome = average_checkpoints(run, output, **options)
    if as_json:
        echo_json(outcome)
    for line in _describe(outcome) if not as_json else []:
        click.echo(line)
    echo_skipped(*filter(None, [training, comparison]))
    outcome.require_written()


def _describe(outcome: "AveragedRun") -> list[str]:
    lines = []
    for number, step in enumerate(outcome.steps):
        verdict = "added" if step.is_added else "left out"
        with_it = "alone, the best" if number == 0 else f"with it, {verdict}"
        lines.append(f"{step.path.name}: GAP@20 {step.gap:.5f} {with_it}")
    if outcome.path is None:
        return lines
    lines.append(f"{outcome.path}: {outcome.description}, batch norm {outcome.batch_norm}.")
    if outcome.gap is None:
        return [*lines, "There are no validation records, so it was not compared with anything."]
    compared = f"Its validation GAP@20 is {outcome.gap:.5f}"
    if outcome.best is not None:
        compared += f"; the best single checkpoint, {outcome.best}, has {outcome.best_gap:.5f}"
    return [*lines, f"{compared}."]
