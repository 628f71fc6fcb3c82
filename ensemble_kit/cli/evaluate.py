"""ensemble-kit evaluate."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import TOP_K
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    EXISTING_FILE_OR_FOLDER,
    device_option,
    echo_csv,
    echo_skipped,
    records_options,
    repeats_option,
    table_options,
)

if TYPE_CHECKING:
    from ensemble_kit.metrics import Metrics
    from ensemble_kit.ranking_metrics import RankingMetrics


@click.command()
@click.argument("model_or_predictions", type=EXISTING_FILE_OR_FOLDER)
@click.argument("data", nargs=-1)
@click.option(
    "--labels", type=EXISTING_FILE, help="CSV of VideoId,Labels for the predicted videos."
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=TOP_K, show_default=True,
    help="How many of each video's best classes GAP and mAP count.",
)  # fmt: skip
@click.option(
    "--rankings",
    is_flag=True,
    help="Also mAP, AUC, d' and lwlrap over whole rankings, as AudioSet's papers report them.",
)
@repeats_option
@device_option
@records_options
@table_options
def evaluate(
    model_or_predictions: Path,
    data: tuple[str, ...],
    labels: Path | None,
    top_k: int,
    rankings: bool,
    repeats: int | None,
    device: str,
    as_json: bool,
    as_csv: bool,
    **reading: Any,
) -> None:
    """Print GAP, Hit@1, PERR and mAP of MODEL_OR_PREDICTIONS.

    A model (a checkpoint, a fused file or an ONNX file) is run on the records DATA. Predictions are
    a file that `ensemble-kit predict` wrote, NumPy's .npy or .npz, or a CSV file in the challenge's
    format. Of a submission of segments, Class,Segments, it prints the MAP of the challenge of 2019,
    by the ratings in the records DATA.

    \b
    Examples:
        ensemble-kit evaluate ensemble/ensemble.onnx 'test/*.tfrecord'
        ensemble-kit evaluate runs/willow-gru/validation.safetensors
        ensemble-kit evaluate predictions.safetensors --rankings
        ensemble-kit evaluate segments.csv 'validate/*.tfrecord'
        ensemble-kit evaluate predictions.csv --labels labels.csv --top-k 20 --json
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.inference import (
        evaluate_model,
        evaluate_predictions,
        rank_model,
        rank_predictions,
    )
    from ensemble_kit.predictions.file import is_predictions_file, read_predictions
    from ensemble_kit.predictions.segment_csv import is_submission

    if is_submission(model_or_predictions):
        _echo_segments(model_or_predictions, data, reading, as_json=as_json, as_csv=as_csv)
        return
    if is_predictions_file(model_or_predictions):
        if data:
            raise click.UsageError(
                "A predictions file takes no DATA; only a model is run on records."
            )
        predictions = read_predictions(model_or_predictions)
        metrics = evaluate_predictions(predictions, labels, k=top_k)
        whole = rank_predictions(predictions, labels) if rankings else None
    else:
        if not data:
            raise click.UsageError("Name the records to run the model on as DATA.")
        records = Records(data, **reading)
        options: Any = {"k": top_k, "repeats": repeats, "device": device}
        metrics, whole = (
            rank_model(model_or_predictions, records, **options)
            if rankings
            else (evaluate_model(model_or_predictions, records, **options), None)
        )
        echo_skipped(records)
    found = metrics.as_dict() | (whole.as_dict() if whole else {})
    if as_json:
        click.echo(json.dumps(found))
        return
    if as_csv:
        echo_csv([found])  # one row, so that those of several models stand under each other
        return
    for name, value in _rows(metrics, whole, top_k):
        click.echo(f"{name:<22}  {value:>9}")


def _rows(
    metrics: "Metrics", whole: "RankingMetrics | None", top_k: int
) -> Iterator[tuple[str, str]]:
    """Yield the name of each figure, and the figure."""
    yield from [
        (f"GAP@{top_k}", f"{metrics.gap:.4f}"),
        ("Hit@1", f"{metrics.hit_at_1:.4f}"),
        ("PERR", f"{metrics.perr:.4f}"),
        (f"mAP@{top_k}", f"{metrics.map:.4f}"),
        ("videos", f"{metrics.videos:,}"),
        ("positives", f"{metrics.positives:,}"),
        ("classes with positives", f"{metrics.classes_with_positives:,}"),
    ]
    if whole:
        d_prime = "none" if whole.d_prime is None else f"{whole.d_prime:.4f}"
        yield from [
            ("mAP, whole rankings", f"{whole.macro_map:.4f}"),
            ("AUC", f"{whole.auc:.4f}"),
            ("d'", d_prime),
            ("lwlrap", f"{whole.lwlrap:.4f}"),
        ]


def _echo_segments(
    path: Path, data: tuple[str, ...], reading: dict[str, Any], *, as_json: bool, as_csv: bool
) -> None:
    """Print what a submission of segments scores."""
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.data.segments import read_ratings
    from ensemble_kit.predictions.segment_csv import read_submission
    from ensemble_kit.segment_metrics import measure_segments

    if not data:
        raise click.UsageError("Name the records that hold the segments' ratings as DATA.")
    records = Records(data, needs_labels=False, **reading)
    metrics = measure_segments(read_submission(path), read_ratings(records))
    if as_json:
        click.echo(json.dumps(metrics.as_dict()))
        return
    if as_csv:
        echo_csv([metrics.as_dict()])
        return
    rows = (
        (f"MAP@{metrics.k:,}", f"{metrics.map_at_k:.4f}"),
        ("ratings", f"{metrics.rated:,}"),
        ("positives", f"{metrics.positives:,}"),
        ("classes with positives", f"{metrics.classes_with_positives:,}"),
    )
    for name, value in rows:
        click.echo(f"{name:<22}  {value}")
    echo_skipped(records)
