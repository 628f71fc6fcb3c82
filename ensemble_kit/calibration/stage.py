"""Calibrate an exported file on predictions of videos that it was not trained on."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.calibration.counts import (
    Counts,
    expected_calibration_error,
    mean_log_loss,
    reliability,
)
from ensemble_kit.calibration.fitting import METHODS, Curve, none
from ensemble_kit.calibration.thresholds import (
    LEVELS,
    best_f1_thresholds,
    precision_thresholds,
    tagged,
)
from ensemble_kit.choices import (
    CALIBRATION_METHOD,
    HELD_OUT_SHARE,
    TOP_K,
    AnyPath,
    CalibrationMethod,
)
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import Vocabulary
from ensemble_kit.errors import CalibrationError, OutputError
from ensemble_kit.files import refuse_overwrite, require_suffix, sha256_of, written_aside
from ensemble_kit.metrics import MetricsAccumulator
from ensemble_kit.predictions.file import Predictions, read_predictions
from ensemble_kit.predictions.labels import labels_of
from ensemble_kit.predictions.rows import Floats as AnyFloats
from ensemble_kit.predictions.videos import labelled_parts, taken
from ensemble_kit.serving.calibration import PROPERTY, Calibration, Floats
from ensemble_kit.serving.metadata import metadata_of
from ensemble_kit.serving.model_card import write_card
from ensemble_kit.serving.onnx_file import copy_with_property, read_properties
from ensemble_kit.serving.session import METADATA_PREFIX, without_prefix
from ensemble_kit.store.provenance import OnnxMetadata


@dataclass(frozen=True)
class CalibratedFile:
    """A file that was calibrated.

    Attributes:
        path: The file.
        calibration: What it was given, with what was measured.
        card: The model card beside it; None where a card was left as it is.
    """

    path: Path
    calibration: Calibration
    card: Path | None


def calibrate(
    model: AnyPath,
    predictions: AnyPath,
    *,
    output: AnyPath,
    labels_path: AnyPath | None = None,
    method: CalibrationMethod = CALIBRATION_METHOD,
    force: bool = False,
) -> CalibratedFile:
    """Write an exported file again, with calibrated probabilities and thresholds in its metadata.

    The graph stays the same to the byte, and so do its probabilities; ``OnnxEnsemble.tags`` applies
    what is added, and a model card says what it is worth, where no other file's card lies. Half of
    the videos, by a hash of their ids, fit every method, and the other half says which has the
    lowest cross-entropy and what it brings; then that is fitted on all of them.

    Args:
        model: The ``.onnx`` file.
        predictions: Its probabilities of videos that it was not trained on, from ``predict``, with
            every class; or ``.npy`` or ``.npz`` of another tool.
        output: The ``.onnx`` file to write.
        labels_path: A CSV file of labels; None takes those in the predictions file.
        method: ``temperature``, ``platt``, ``isotonic``, ``none`` for thresholds alone, or
            ``auto``; see ``calibration.fitting``.
        force: Whether an existing file may be replaced.

    Raises:
        CalibrationError: The predictions are of another model, or list only some classes, or a half
            of the videos has no labels.
        ExportError: The model is damaged.
        OutputError: ``output`` exists and ``force`` is False, has another suffix, or lies in
            another folder than the model's separate weights.
        PredictionsError: The predictions are damaged, or have no labels.
        ProviderError: Another tool wrote the model.
    """
    model, output = Path(model), Path(output)
    require_suffix(output, ".onnx")
    refuse_overwrite(output, force=force)
    properties = read_properties(model)
    metadata = metadata_of(without_prefix(properties), model)
    beside = metadata.weights_file
    if beside is not None and output.resolve().parent != model.resolve().parent:
        raise OutputError(
            f"{output} would lie in another folder than {beside.path}, which holds its weights.",
            hint=f"Write it into {model.parent}.",
        )
    found = read_predictions(Path(predictions))
    current = sha256_of(model)
    exported = _exported_sha256(properties) or current
    _check(found, model, metadata, {metadata.fused_sha256, exported, current})
    labels = labels_of(found, None if labels_path is None else Path(labels_path))
    halves = _halves(found, labels)
    first, second = (_counted(found, labels, videos) for videos in halves)
    curves = {name: fit(first) for name, fit in METHODS.items()}
    losses = {name: mean_log_loss(second, curve.at_bins) for name, curve in curves.items()}
    chosen = min(losses, key=losses.__getitem__) if method == "auto" else method
    fitted = _calibration(chosen, curves[chosen], first, {})
    measured = _measured(found, labels, halves[1], second, fitted, curves[chosen].at_bins)
    both = first + second
    calibration = _calibration(
        chosen,
        METHODS[chosen](both),
        both,
        {"exported_sha256": exported, "videos": len(found.ids), "log_loss": losses, **measured},
    )
    with written_aside(output, force=force) as aside:
        key, text = METADATA_PREFIX + PROPERTY, calibration.to_json()
        copy_with_property(model, aside, key, text, properties)
    # A card that is there may be that of another file, unless the model itself was replaced.
    is_replaced = output.resolve() == model.resolve()
    card = write_card(output, metadata, calibration, force=is_replaced)
    return CalibratedFile(output, calibration, card)


def _exported_sha256(properties: Mapping[str, str]) -> str | None:
    """Return the hash that a model had before it was calibrated; None if it was not."""
    text = properties.get(METADATA_PREFIX + PROPERTY)
    try:
        return str(json.loads(text)["measured"]["exported_sha256"]) if text else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None  # a damaged calibration is replaced


def _check(
    predictions: Predictions, model: Path, metadata: OnnxMetadata, hashes: Collection[str]
) -> None:
    """Raise unless predictions are of all classes of a model, which has had these hashes."""
    if predictions.is_sparse:
        raise CalibrationError(
            f"{predictions.path} lists only some classes of each video; calibration needs all.",
            hint="Predict again without --top-k into a .safetensors file.",
        )
    difference = predictions.vocabulary.difference(
        Vocabulary(len(metadata.label_names), metadata.label_names)
    )
    if difference is not None:
        raise CalibrationError(
            difference.between(str(predictions.path), f"the members of {model}"),
            hint=f"Write predictions with `ensemble-kit predict {model} DATA -o FILE`.",
        )
    made_by = predictions.metadata and predictions.metadata.model
    if made_by and made_by.file.sha256 not in hashes:
        raise CalibrationError(
            f"{predictions.path} holds predictions of {made_by.file.path}, not of {model}.",
            hint=f"Write them with `ensemble-kit predict {model} DATA -o FILE`.",
        )


def _halves(predictions: Predictions, labels: LabelLists) -> list[NDArray[np.int64]]:
    """Return the videos to fit on, and those to measure on."""
    parts = labelled_parts(
        predictions.ids,
        labels,
        HELD_OUT_SHARE,
        purposes=("to fit on", "to measure on"),
        refusal=lambda problem: CalibrationError(
            f"{predictions.path} {problem}", hint="Predict more videos."
        ),
    )
    return [np.flatnonzero(part) for part in parts]


def _blocks(
    predictions: Predictions, labels: LabelLists, videos: NDArray[np.int64]
) -> Iterator[tuple[AnyFloats, LabelLists]]:
    """Yield probabilities and labels of some videos, some at a time."""
    step = max(1, 2**20 // predictions.num_classes)
    for start in range(0, len(videos), step):
        places = videos[start : start + step]
        yield predictions.taken(places), taken(labels, places)


def _counted(predictions: Predictions, labels: LabelLists, videos: NDArray[np.int64]) -> Counts:
    counts = Counts.empty(predictions.num_classes)
    for rows, own in _blocks(predictions, labels, videos):
        counts.add(rows, own)
    return counts


def _calibration(
    method: str, curve: Curve, counts: Counts, measured: Mapping[str, Any]
) -> Calibration:
    at_bins = curve.at_bins
    return Calibration(
        method,
        curve.knots,
        curve.values,
        LEVELS,
        precision_thresholds(counts, at_bins),
        best_f1_thresholds(counts, at_bins),
        measured,
    )


def _measured(
    predictions: Predictions,
    labels: LabelLists,
    videos: NDArray[np.int64],
    counts: Counts,
    fitted: Calibration,
    at_bins: Floats,
) -> dict[str, Any]:
    """Return what a calibration that was fitted on other videos brings on these."""
    raw = none(counts).at_bins
    of_levels = [tagged(counts, thresholds) for thresholds in fitted.thresholds.T]
    best_tags, best_hits = tagged(counts, fitted.best_f1)
    positives = int(counts.positives.sum())
    before, after = _gaps(predictions, labels, videos, fitted)
    return {
        "measured_on": len(videos),
        "expected_calibration_error": {
            "before": expected_calibration_error(counts, raw),
            "after": expected_calibration_error(counts, at_bins),
        },
        "reliability": {
            name: [column.tolist() for column in reliability(counts, given)]
            for name, given in (("before", raw), ("after", at_bins))
        },
        "gap": {"before": before, "after": after},
        "levels": [
            {
                "min_precision": float(level),
                "precision": hits / tags if tags else None,
                "recall": hits / positives,
                "tags": tags,
            }
            for level, (tags, hits) in zip(LEVELS, of_levels, strict=True)
        ],
        "best_f1": {
            "precision": best_hits / max(best_tags, 1),
            "recall": best_hits / positives,
            "f1": 2 * best_hits / (best_tags + positives),
            "tags": best_tags,
        },
    }


def _gaps(
    predictions: Predictions,
    labels: LabelLists,
    videos: NDArray[np.int64],
    calibration: Calibration,
) -> tuple[float, float]:
    """Return the GAP of some videos before and after their probabilities are calibrated."""
    before, after = (
        MetricsAccumulator(num_classes=predictions.num_classes, k=TOP_K) for _ in range(2)
    )
    for rows, own in _blocks(predictions, labels, videos):
        before.add(rows, own)
        after.add(calibration.calibrated(rows), own)
    return before.result().gap, after.result().gap
