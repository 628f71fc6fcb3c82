"""Evaluate: the metrics of predictions that lie in a file, or of a model on records."""

from dataclasses import replace
from pathlib import Path

from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import PredictionsError
from ensemble_kit.metrics import Metrics, MetricsAccumulator
from ensemble_kit.predictions.file import Predictions, aligned, read_labels_csv, taken


def evaluate_predictions(
    predictions: Predictions, labels_path: Path | None, *, k: int = 20
) -> Metrics:
    """Return the metrics of a predictions file, read some videos at a time.

    Ties rank by the videos' order in the predictions file, then by class index; a class that a CSV
    file does not list is not a prediction of it. See ``metrics``.

    Args:
        predictions: From ``read_predictions``.
        labels_path: A CSV file of labels for the same videos, in any order; None takes the labels
            in the predictions file.
        k: How many classes of each video GAP and mAP look at.

    Raises:
        CheckpointError: The predictions file has gone, or is damaged.
        PredictionsError: There are no labels, the videos are not the same, a label is not one of
            the predictions' classes, or a value is not a probability.
    """
    labels = predictions.labels
    if labels_path is not None:
        known_classes = None if predictions.is_sparse else predictions.num_classes
        ids, lists = read_labels_csv(labels_path, num_classes=known_classes)
        order = aligned(ids, labels_path, to=predictions.ids, of=predictions.path)
        labels = taken(lists, order)
    if labels is None or not labels.classes.size:
        raise PredictionsError(
            f"{labels_path or predictions.path} holds no labels.",
            mend="Name a CSV file of the videos' labels with --labels.",
        )
    num_classes = max(predictions.num_classes, int(labels.classes.max()) + 1)
    metrics = MetricsAccumulator(num_classes=num_classes, k=k)
    for videos, rows in replace(predictions, num_classes=num_classes).blocks():
        metrics.add(rows, labels.rows(videos.start, videos.stop))
    return metrics.result()


def evaluate_model(
    model: Path, records: Records, *, k: int = 20, repeats: int | None = None, device: str = "cpu"
) -> Metrics:
    """Return the metrics of a checkpoint, a fused file or an ONNX file on some records.

    Args:
        model: The file.
        records: Records of the model's schema.
        k: How many classes of each video GAP and mAP look at.
        repeats: Test-time draws to average; None means 1, or what an ONNX file was exported with.
        device: ``cpu`` or ``cuda``.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind.
        PredictionsError: The records are not of the model's modalities or vocabulary.
    """
    from ensemble_kit.networks.loading import load  # here: evaluating a CSV file needs no torch

    return load(model, repeats=repeats, device=device).measure(records, k=k)
