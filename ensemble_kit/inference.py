"""Run a model on records: its probabilities as a file, and its metrics.

Models are imported inside the functions that run one: evaluating a CSV file needs no torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble_kit.choices import BATCH_SIZE, DEVICE
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import check_fits
from ensemble_kit.errors import PredictionsError
from ensemble_kit.files import refuse_overwrite
from ensemble_kit.metrics import Metrics, MetricsAccumulator
from ensemble_kit.predictions.challenge_csv import read_labels_csv
from ensemble_kit.predictions.file import (
    BLOCK_VALUES,
    Predictions,
    write_predictions,
    write_predictions_csv,
)
from ensemble_kit.predictions.videos import aligned, taken
from ensemble_kit.progress import progress
from ensemble_kit.store.provenance import FileMetadata, ModelMetadata

if TYPE_CHECKING:
    from ensemble_kit.networks.loading import LoadedModel


def predict(
    model: Path,
    records: Records,
    output: Path,
    *,
    repeats: int | None = None,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
    device: str = DEVICE,
    force: bool = False,
) -> Path:
    """Write the probabilities of a model on some records.

    Args:
        model: A checkpoint, a fused file or an ONNX file.
        records: What to tag, in the files' order.
        output: A ``.safetensors`` file, or a ``.csv`` in the challenge's format.
        repeats: Test-time draws to average; None means 1, or what an ONNX file was exported with.
        batch_size: Videos at a time; changes nothing but memory and speed.
        top_k: How many classes of each video to keep; None keeps all, and 20 in a ``.csv``.
        device: ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``output`` exists and ``force`` is False.
        PredictionsError: The records are not of the model's modalities or vocabulary.
    """
    from ensemble_kit.networks.loading import load

    refuse_overwrite(output, force=force)
    loaded = load(model, repeats=repeats, device=device)
    check_fits(loaded.schema, records.schema, path=model)
    ids, labels, rows = _run(loaded, records, batch_size)
    names = loaded.schema.names
    if output.suffix == ".csv":
        write_predictions_csv(output, ids=ids, rows=rows, top_k=top_k or 20, force=force)
        return output
    record = ModelMetadata(
        file=FileMetadata.of(model, output.parent),
        kind=loaded.kind,
        num_values=loaded.num_values,
        repeats=loaded.repeats,
    )
    write_predictions(
        output,
        ids=ids,
        label_names=names,
        labels=labels,
        rows=rows,
        name=loaded.name,
        model=record,
        top_k=top_k,
        force=force,
    )
    return output


def _run(
    loaded: "LoadedModel", records: Records, batch_size: int
) -> tuple[tuple[str, ...], LabelLists, "np.ndarray[tuple[int, int], np.dtype[np.float32]]"]:
    ids: list[str] = []
    classes: list[np.ndarray] = []
    rows = []
    with progress(f"predict {loaded.name}", 0) as shown:
        for batch in records.batches(batch_size):
            ids.extend(batch.ids)
            classes.extend(np.split(batch.labels.classes, batch.labels.offsets[1:-1]))
            rows.append(loaded.probabilities(batch))
            shown.update(len(ids), "videos")
    return tuple(ids), LabelLists.from_lists(classes), np.concatenate(rows)


def evaluate_predictions(
    predictions: Predictions,
    labels_path: Path | None,
    *,
    k: int = 20,
    block_values: int = BLOCK_VALUES,
) -> Metrics:
    """Return the metrics of a predictions file, read some videos at a time.

    Ties rank by the videos' order in the predictions file, then by class index; a class that a CSV
    file does not list is not a prediction of it. See ``metrics``.

    Args:
        predictions: From ``read_predictions``.
        labels_path: A CSV file of labels for the same videos, in any order; None takes the labels
            in the predictions file.
        k: How many classes of each video GAP and mAP look at.
        block_values: About how many probabilities to read together.

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
            hint="Name a CSV file of the videos' labels with --labels.",
        )
    num_classes = max(predictions.num_classes, int(labels.classes.max()) + 1)
    metrics = MetricsAccumulator(num_classes=num_classes, k=k)
    for videos, rows in replace(predictions, num_classes=num_classes).blocks(block_values):
        metrics.add(rows, labels.rows(videos.start, videos.stop))
    return metrics.result()


def evaluate_model(
    model: Path, records: Records, *, k: int = 20, repeats: int | None = None, device: str = DEVICE
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
    from ensemble_kit.networks.loading import load

    return load(model, repeats=repeats, device=device).measure(records, k=k)
