"""The labels of predicted videos."""

from pathlib import Path

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError
from ensemble_kit.predictions.challenge_csv import read_labels_csv
from ensemble_kit.predictions.file import Predictions
from ensemble_kit.predictions.videos import aligned, taken


def labels_of(predictions: Predictions, labels_path: Path | None) -> LabelLists:
    """Return the labels of predicted videos, in their order.

    Args:
        predictions: From ``read_predictions``.
        labels_path: A CSV file of labels for the same videos, in any order; None takes the labels
            in the predictions file.

    Raises:
        PredictionsError: There are no labels, the videos are not the same, or a label is not one of
            the predictions' classes.
    """
    labels = predictions.labels
    if labels_path is not None:
        known_classes = predictions.num_classes if predictions.knows_classes else None
        ids, lists = read_labels_csv(labels_path, num_classes=known_classes)
        order = aligned(ids, labels_path, to=predictions.ids, of=predictions.path)
        labels = taken(lists, order)
    if labels is None or not labels.classes.size:
        raise PredictionsError(
            f"{labels_path or predictions.path} holds no labels.",
            hint="Name a CSV file of the videos' labels with --labels.",
        )
    return labels
