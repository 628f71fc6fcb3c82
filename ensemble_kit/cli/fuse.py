"""ensemble-kit fuse."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.choices import Dtype
from ensemble_kit.cli.options import (
    FILE,
    FOLDER,
    echo_json,
    echo_skipped,
    force_option,
    json_option,
    max_gap_loss_option,
    max_size_option,
    one_of,
    records_options,
)
from ensemble_kit.store.workspace import FUSED, SELECTION
from ensemble_kit.wording import counted


@click.command()
@click.argument("selection", type=FILE, default=SELECTION)
@click.option("-o", "--output", type=FILE, default=FUSED, show_default=True, help="File to write.")
@click.option(
    "--dtype",
    type=one_of(Dtype),
    help="Precision of all members; integers and trees of foreign models stay as they are.  "
    "[default: that in which each was selected]",
)
@click.option(
    "--data", multiple=True, help="Validation records to measure GAP on before and after rounding."
)
@click.option(
    "--refit",
    type=FOLDER,
    help="Folder of runs that were trained again on all records; of a member that was selected by "
    "out-of-fold predictions, the run of its name there is fused.",
)
@max_gap_loss_option("Maximum GAP that rounding may lose on --data.")
@max_size_option
@records_options
@force_option
@json_option
def fuse(
    selection: Path,
    output: Path,
    dtype: Any,
    data: tuple[str, ...],
    refit: Path | None,
    max_gap_loss: float,
    max_size: str,
    force: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Fuse the members of SELECTION into one file that fits the size limit.

    SELECTION is ensemble/selection.json unless named. The file is compared with the members run
    one by one before it is kept. int8 and int4 store the large matrices in blocks of whole numbers
    with a scale each, and the rest in bf16.

    \b
    Examples:
        ensemble-kit fuse --dtype int8 --data 'validate/*.tfrecord'
        ensemble-kit fuse --refit runs
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.files import format_of_limit, parse_size
    from ensemble_kit.fusion.stage import fuse as fuse_members

    records = Records(data, **reading) if data else None
    fused = fuse_members(
        selection,
        output,
        dtype=dtype,
        max_size=parse_size(max_size),
        records=records,
        refit=refit,
        max_gap_loss=max_gap_loss,
        force=force,
    )
    if as_json:
        echo_json(fused)
        return
    loss, precisions = fused.loss, " and ".join(dict.fromkeys(fused.dtypes))
    whose = "made-up videos" if records is None else "these records"
    click.echo(
        f"{fused.path}: {counted(len(fused.members), 'member')} in {precisions}, "
        f"{format_of_limit(fused.num_bytes, fused.max_size)}.\n"
        f"Equal to its members; rounding to {precisions} changed a probability of {whose} "
        f"by {loss.worst_change:.2g} at most, {loss.mean_change:.2g} on average."
    )
    if fused.mixing == "given":
        click.echo("The members are mixed by coefficients that were given, not chosen.")
    if fused.coarse:
        click.echo(
            f"{len(fused.coarse)} tensors are too near 0 for fp16, {fused.coarse[0]} first; bf16 "
            "would lose less of them."
        )
    if records is not None:
        click.echo(
            f"GAP on {counted(loss.num_videos, 'video')}: {loss.gap_before:.4f} before rounding, "
            f"{loss.gap_after:.4f} after."
        )
        echo_skipped(records)
