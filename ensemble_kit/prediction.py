"""Predict: the probabilities of a model on some records, as a file."""

from os.path import relpath
from pathlib import Path

import numpy as np

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.files import refuse_overwrite, sha256_of
from ensemble_kit.networks.loading import BATCH_SIZE, LoadedModel, check_fits, load
from ensemble_kit.predictions.file import write_predictions, write_predictions_csv
from ensemble_kit.progress import progress
from ensemble_kit.store.provenance import FileRecord, ModelRecord


def predict(
    model: Path,
    records: Records,
    output: Path,
    *,
    repeats: int | None = None,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
    device: str = "cpu",
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
    refuse_overwrite(output, force=force)
    loaded = load(model, repeats=repeats, device=device)
    check_fits(loaded.schema, records.schema, path=model)
    ids, labels, rows = _run(loaded, records, batch_size)
    names = loaded.schema.names
    if output.suffix == ".csv":
        write_predictions_csv(output, ids=ids, rows=rows, top_k=top_k or 20, force=force)
        return output
    record = ModelRecord(
        file=FileRecord(path=relpath(model, output.parent), sha256=sha256_of(model)),
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
    loaded: LoadedModel, records: Records, batch_size: int
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
