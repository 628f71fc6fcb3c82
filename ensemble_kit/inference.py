"""Run a model on records, and write its probabilities or compute its metrics.

What runs a model is imported inside the functions that do: evaluating a CSV file needs no torch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import BATCH_SIZE, DEVICE, TOP_K, AnyPath, Dtype
from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import check_fits
from ensemble_kit.errors import PredictionsError
from ensemble_kit.files import refuse_overwrite
from ensemble_kit.metrics import Metrics, MetricsAccumulator
from ensemble_kit.predictions.columns import common_columns
from ensemble_kit.predictions.file import BLOCK_VALUES, Predictions, read_predictions
from ensemble_kit.predictions.labels import labels_of
from ensemble_kit.predictions.rows import Floats
from ensemble_kit.predictions.writing import (
    PredictionsWriter,
    csv_written,
    predictions_written,
    require_suffix,
    write_predictions,
)
from ensemble_kit.progress import progress
from ensemble_kit.ranking_metrics import RankingMetrics, measure_rankings
from ensemble_kit.store.provenance import (
    FUSIBLE,
    CheckpointMetadata,
    FileMetadata,
    ModelMetadata,
)
from ensemble_kit.store.tensor_files import TensorFile, open_tensors

if TYPE_CHECKING:
    from ensemble_kit.networks.loading import LoadedModel


class KeptPredictions:
    """A model's probabilities on some records, kept batch by batch until they are written.

    So a caller that runs a model for another purpose, such as its GAP, need not run it twice.
    """

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._classes: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.float32]] = []

    @property
    def num_videos(self) -> int:
        """How many videos have been added."""
        return len(self._ids)

    def add(self, batch: Batch, probabilities: NDArray[np.float32]) -> None:
        """Keep the probabilities of a batch, ``(B, C)``; batches come in the records' order."""
        self._ids.extend(batch.ids)
        self._classes.extend(np.split(batch.labels.classes, batch.labels.offsets[1:-1]))
        self._rows.append(probabilities)

    def write(self, output: Path, *, model: TensorFile, force: bool = False) -> None:
        """Write them as the predictions of a checkpoint, as ``predict`` does.

        Args:
            output: A ``.safetensors`` file.
            model: The open checkpoint, whose one fixed draw of frames the probabilities come from.
            force: Whether an existing file may be replaced.
        """
        from ensemble_kit.networks.fused_member import model_metadata

        metadata = model.metadata_as(CheckpointMetadata)
        write_predictions(
            output,
            ids=self._ids,
            label_names=metadata.data_schema.names,
            labels=LabelLists.from_lists(self._classes),
            rows=self._rows,
            name=metadata.name,
            model=model_metadata(model, output.parent, repeats=1),
            force=force,
        )


def predict(
    model: AnyPath,
    records: Records,
    output: AnyPath,
    *,
    repeats: int | None = None,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
    dtype: Dtype | None = None,
    device: str = DEVICE,
    force: bool = False,
) -> Path:
    """Write the probabilities of a model on some records.

    Args:
        model: A checkpoint, a foreign model, a fused file or an ONNX file.
        records: The videos to tag, in the files' order. They need no labels.
        output: A ``.safetensors`` file, or a ``.csv`` file in the challenge's format. Upper and
            lower case of these suffixes are the same. Rows go to the disk as they come.
        repeats: Test-time draws to average; None means 1, or for an ONNX file the number it was
            exported with.
        batch_size: Videos at a time; it changes memory and speed only.
        top_k: How many classes of each video to keep; None keeps all, and 20 in a ``.csv``.
        dtype: The precision to round the weights of a checkpoint or foreign model to, as ``fuse``
            would store them; None runs them as they are.
        device: ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        PredictionsError: The records do not have the model's modalities or vocabulary.
    """
    model, output = Path(model), Path(output)
    require_suffix(output)
    refuse_overwrite(output, force=force)
    written: AbstractContextManager[PredictionsWriter]
    if output.suffix.lower() == ".csv":
        loaded = load_in(dtype, model, repeats=repeats, device=device)
        check_fits(loaded.schema, records.schema, path=model)
        written = csv_written(output, top_k=top_k or TOP_K, force=force)
    else:
        loaded, described = load_for(
            records, model, output.parent, dtype=dtype, repeats=repeats, device=device
        )
        written = predictions_written(
            output,
            label_names=loaded.schema.names,
            name=loaded.name,
            model=described,
            top_k=top_k,
            force=force,
        )
    with written as writer, progress(f"predict {loaded.name}", 0) as shown:
        num_videos = 0
        for batch in add_predictions(loaded, records, writer, batch_size=batch_size):
            num_videos += len(batch.ids)
            shown.update(num_videos, "videos")
    return output


def load_in(dtype: Dtype | None, model: Path, *, repeats: int | None, device: str) -> "LoadedModel":
    """Open a model with its weights rounded to a precision, or as they are with None."""
    from ensemble_kit.networks.fused_member import RoundedTo
    from ensemble_kit.networks.loading import load

    rounded = None if dtype is None else RoundedTo(dtype)
    return load(model, repeats=repeats, device=device, rounded=rounded)


def load_for(
    records: Records,
    model: Path,
    folder: Path,
    *,
    dtype: Dtype | None,
    repeats: int | None,
    device: str,
) -> tuple["LoadedModel", ModelMetadata]:
    """Open a model for some records, and describe it for the metadata of predictions in a folder.

    Raises:
        PredictionsError: The records do not have the model's modalities or vocabulary.
    """
    from ensemble_kit.networks.fused_member import RoundedTo, model_metadata
    from ensemble_kit.networks.loading import load_opened

    if model.suffix.lower() == ".onnx":
        loaded = load_in(dtype, model, repeats=repeats, device=device)
        check_fits(loaded.schema, records.schema, path=model)
        return loaded, _described(loaded, FileMetadata.of(model, folder))
    rounded = None if dtype is None else RoundedTo(dtype)
    with open_tensors(model) as file:
        loaded = load_opened(file, repeats=repeats, device=device, rounded=rounded)
        check_fits(loaded.schema, records.schema, path=model)
        if loaded.kind in FUSIBLE:
            return loaded, model_metadata(file, folder, repeats=loaded.repeats, dtype=dtype)
        return loaded, _described(loaded, FileMetadata.of(model, folder, sha256=file.sha256()))


def _described(loaded: "LoadedModel", file: FileMetadata) -> ModelMetadata:
    return ModelMetadata(
        file=file, kind=loaded.kind, num_values=loaded.num_values, repeats=loaded.repeats
    )


def add_predictions(
    loaded: "LoadedModel", records: Records, writer: PredictionsWriter, *, batch_size: int
) -> Iterator[Batch]:
    """Write a model's probabilities on some records, and yield each batch that is written."""
    for batch in records.batches(batch_size):
        writer.add(batch.ids, batch.labels, loaded.probabilities(batch))
        yield batch


def evaluate_predictions(
    predictions: Predictions,
    labels_path: Path | None,
    *,
    k: int = TOP_K,
    block_values: int = BLOCK_VALUES,
) -> Metrics:
    """Return the metrics of a predictions file, which is read some videos at a time.

    Equal probabilities rank by the videos' order in the predictions file, then by class index. A
    class that a CSV file does not list for a video is not predicted for it. See ``metrics``.

    Args:
        predictions: From ``read_predictions``.
        labels_path: A CSV file of labels for the same videos, in any order; None takes the labels
            in the predictions file.
        k: How many of each video's best classes GAP and mAP count.
        block_values: About how many probabilities to read together.

    Raises:
        CheckpointError: The predictions file is gone or damaged.
        PredictionsError: There are no labels, the videos are not the same, a label is not one of
            the predictions' classes, or a value is not a probability.
    """
    labels = labels_of(predictions, labels_path)
    (predictions,), labels, classes = common_columns([predictions], labels)
    metrics = MetricsAccumulator(num_classes=len(classes), k=k)
    for videos, rows in predictions.blocks(block_values):
        metrics.add(rows, labels.rows(videos.start, videos.stop))
    return metrics.result()


def rank_predictions(
    predictions: Predictions, labels_path: Path | None, *, block_values: int = BLOCK_VALUES
) -> RankingMetrics:
    """Return what whole rankings of a predictions file say, read twice, some videos at a time.

    It takes and raises what ``evaluate_predictions`` does.

    Raises:
        PredictionsError: The file lists only some classes of each video.
    """
    if predictions.is_sparse:
        raise PredictionsError(
            f"{predictions.path} lists only some classes of each video, but whole rankings need "
            "all.",
            hint="Predict again without --top-k into a .safetensors file, or leave out --rankings.",
        )
    labels = labels_of(predictions, labels_path)

    def blocks() -> Iterator[tuple[Floats, LabelLists]]:
        for videos, rows in predictions.blocks(block_values):
            yield rows, labels.rows(videos.start, videos.stop)

    return measure_rankings(blocks, predictions.num_classes)


def rank_model(
    model: AnyPath,
    records: Records,
    *,
    repeats: int | None = None,
    device: str = DEVICE,
    k: int = TOP_K,
) -> tuple[Metrics, RankingMetrics]:
    """Return all metrics of a model on some records, run once.

    Its probabilities are kept in a temporary file, 4 bytes for each class of each video. It takes
    and raises what ``evaluate_model`` does.
    """
    with TemporaryDirectory(prefix="ensemble-kit-") as folder:
        output = Path(folder) / "predictions.safetensors"
        predictions = read_predictions(
            predict(model, records, output, repeats=repeats, device=device)
        )
        return evaluate_predictions(predictions, None, k=k), rank_predictions(predictions, None)


def evaluate_model(
    model: AnyPath,
    records: Records,
    *,
    k: int = TOP_K,
    repeats: int | None = None,
    device: str = DEVICE,
) -> Metrics:
    """Return the metrics of a model on some records.

    Args:
        model: A checkpoint, a foreign model, a fused file or an ONNX file.
        records: Records of the model's schema.
        k: How many of each video's best classes GAP and mAP count.
        repeats: Test-time draws to average; None means 1, or for an ONNX file the number it was
            exported with.
        device: ``cpu`` or ``cuda``.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind.
        PredictionsError: The records do not have the model's modalities or vocabulary.
    """
    from ensemble_kit.networks.loading import load

    return load(model, repeats=repeats, device=device).measure(records, k=k)
