"""ensemble-kit evaluate."""

import json
from pathlib import Path

import click

from ensemble_kit.cli.options import EXISTING_FILE, json_option


@click.command()
@click.argument("model_or_predictions", type=EXISTING_FILE)
@click.argument("data", nargs=-1)
@click.option("--labels", type=EXISTING_FILE, help="CSV of VideoId,Labels for the predictions.")
@click.option(
    "--top-k", type=click.IntRange(min=1), default=20, show_default=True,
    help="Classes of each video that GAP and mAP look at.",
)  # fmt: skip
@json_option
def evaluate(
    model_or_predictions: Path,
    data: tuple[str, ...],
    labels: Path | None,
    top_k: int,
    as_json: bool,
) -> None:
    """Print GAP, Hit@1, PERR and mAP of MODEL_OR_PREDICTIONS.

    Predictions are a file that `ensemble-kit predict` wrote, or a CSV in the challenge's format.

    \b
    Examples:
        ensemble-kit evaluate runs/gru/validation.safetensors
        ensemble-kit evaluate predictions.csv --labels labels.csv --top-k 20 --json
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.evaluation import evaluate_predictions
    from ensemble_kit.predictions import read_predictions

    if data:
        raise click.UsageError("DATA belongs to a model; predictions have been made already.")
    metrics = evaluate_predictions(read_predictions(model_or_predictions), labels, k=top_k)
    if as_json:
        click.echo(json.dumps(metrics.as_dict()))
        return
    for name, value in (
        (f"GAP@{top_k}", f"{metrics.gap:.4f}"),
        ("Hit@1", f"{metrics.hit_at_1:.4f}"),
        ("PERR", f"{metrics.perr:.4f}"),
        (f"mAP@{top_k}", f"{metrics.map:.4f}"),
        ("videos", f"{metrics.videos:,}"),
        ("positives", f"{metrics.positives:,}"),
        ("classes with positives", f"{metrics.classes_with_positives:,}"),
    ):
        click.echo(f"{name:<22}  {value:>9}")
