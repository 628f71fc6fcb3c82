"""One predictions file, or a challenge CSV, of a folder of them."""

from pathlib import Path

import numpy as np

from ensemble_kit.choices import TOP_K
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError
from ensemble_kit.files import refuse_overwrite
from ensemble_kit.predictions.file import BLOCK_VALUES, Predictions, read_predictions
from ensemble_kit.predictions.folder import shard_paths
from ensemble_kit.predictions.rows import JoinedRows
from ensemble_kit.predictions.writing import csv_written, predictions_written, require_suffix


def merge(folder: Path, output: Path, *, top_k: int | None = None, force: bool = False) -> Path:
    """Write the predictions of a folder as one file, in constant memory but for ids and labels.

    Args:
        folder: A folder of predictions that lacks none.
        output: A ``.safetensors`` file, which keeps what the folder keeps, or a ``.csv`` file in
            the challenge's format.
        top_k: How many classes of each video a ``.csv`` lists; None means 20.
        force: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        PredictionsError: The folder lacks a file, its files were made differently, or it lists
            fewer classes of each video than ``top_k``.
    """
    require_suffix(output)
    refuse_overwrite(output, force=force)
    shard_paths(folder)  # a single file, which could be read too, is refused
    predictions = read_predictions(folder)
    if output.suffix.lower() == ".csv":
        _write_csv(predictions, output, top_k=top_k or TOP_K, force=force)
    else:
        write_joined(predictions, output, force=force)
    return output


def _write_csv(predictions: Predictions, output: Path, *, top_k: int, force: bool) -> None:
    metadata, none = predictions.metadata, LabelLists.from_lists([])
    kept = metadata.top_k if metadata else None
    if kept is not None and kept < top_k:
        raise PredictionsError(
            f"{predictions.path} keeps {kept} classes of each video, and {top_k} were asked for.",
            hint=f"Give --top-k {kept}, or predict again and keep more.",
        )
    with csv_written(output, top_k=top_k, force=force) as writer:
        for videos, rows in predictions.blocks():
            writer.add(predictions.ids[videos], none, rows)


def write_joined(predictions: Predictions, output: Path, *, force: bool) -> None:
    """Write predictions that lie in several files of the kit, ``JoinedRows``, as one."""
    metadata, source, labels = predictions.metadata, predictions.source, predictions.labels
    assert metadata is not None
    assert labels is not None
    assert isinstance(source, JoinedRows)
    model = metadata.model
    if model is not None:
        model = model.at(predictions.home, output.parent)
    step = max(1, BLOCK_VALUES // (metadata.top_k or predictions.num_classes))
    with predictions_written(
        output,
        label_names=metadata.label_names,
        name=metadata.name,
        model=model,
        top_k=metadata.top_k,
        force=force,
    ) as writer:
        starts = source.starts.tolist()
        for part, first, end in zip(source.parts, starts, starts[1:], strict=False):
            for start in range(first, end, step):
                stop = min(start + step, end)
                places = np.arange(start, stop) - first
                ids = predictions.ids[start:stop]
                writer.copy(ids, labels.rows(start, stop), part, places)
