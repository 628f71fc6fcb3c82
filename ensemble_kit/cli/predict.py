"""ensemble-kit predict."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.choices import BATCH_SIZE
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    FILE,
    device_option,
    echo_json,
    echo_skipped,
    force_option,
    json_option,
    records_options,
    repeats_option,
)


@click.command()
@click.argument("model", type=EXISTING_FILE)
@click.argument("data", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    help="File to write: .safetensors, or .csv in the challenge's format.",
)
@repeats_option
@click.option("--batch-size", type=click.IntRange(min=1), default=BATCH_SIZE, show_default=True)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="How many classes of each video to keep  [default: all, 20 in a .csv].",
)
@device_option
@records_options
@force_option
@json_option
def predict(
    model: Path,
    data: tuple[str, ...],
    output: Path,
    repeats: int | None,
    batch_size: int,
    top_k: int | None,
    device: str,
    force: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Write the probabilities of MODEL on the records DATA.

    MODEL is a checkpoint, a fused file or an ONNX file. The records need no labels.

    \b
    Examples:
        ensemble-kit predict ensemble/ensemble.onnx 'test/*.tfrecord' -o submission.csv
        ensemble-kit predict runs/gru/averaged.safetensors 'validate/*.tfrecord' --top-k 100 \\
            -o gru-100.safetensors
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.inference import predict as predict_records

    records = Records(data, needs_labels=False, **reading)
    predict_records(
        model,
        records,
        output,
        repeats=repeats,
        batch_size=batch_size,
        top_k=top_k,
        device=device,
        force=force,
    )
    if as_json:
        echo_json({"path": output, "skipped": records.num_skipped})
        return
    click.echo(output)
    echo_skipped(records)
