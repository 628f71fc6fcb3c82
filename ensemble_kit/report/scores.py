"""What every model of a workspace scores on some records, and how large and how slow it is."""

import time
from collections.abc import Iterator
from os.path import exists
from pathlib import Path

from ensemble_kit.choices import TOP_K
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import InputError
from ensemble_kit.networks.loading import load
from ensemble_kit.progress import progress
from ensemble_kit.report.row import ENSEMBLE, Row
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.store.provenance import FusedMetadata, dtypes_of
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.workspace import FUSED, RUNS, RunFolder


def score_models(workspace: Path, records: Records, *, k: int = TOP_K) -> list[Row]:
    """Run every model of a workspace on the same records.

    The models are each run's last checkpoint and averaged checkpoint, and every fused and ONNX file
    in the ensemble's folder. Fused files are run with 1 repeat and with as many as any ONNX file
    averages.

    Raises:
        InputError: The workspace has no runs.
        PredictionsError: The records are not of the models' modalities or vocabulary.
    """
    models = list(_models(workspace))
    if not models:
        raise InputError(
            f"{workspace / RUNS} holds no runs.", hint="Run `ensemble-kit train` first."
        )
    rows = []
    with progress("report", len(models)) as shown:
        for done, (name, form, path, repeats) in enumerate(models, start=1):
            loaded = load(path, repeats=repeats)
            start = time.perf_counter()
            metrics = loaded.measure(records, k=k)
            seconds = (time.perf_counter() - start) / max(metrics.videos, 1)
            size = path.stat().st_size
            rows.append(
                Row(name, form, loaded.repeats, k, metrics.gap, metrics.hit_at_1, size, seconds)
            )
            shown.update(done, f"{name}, {form}")
    return rows


def _models(workspace: Path) -> Iterator[tuple[str, str, Path, int | None]]:
    """Yield name, form, file and repeats of each model, members first."""
    for folder in sorted((workspace / RUNS).glob("*/checkpoints")):
        run = RunFolder(folder.parent)
        yield run.path.name, "last checkpoint", run.checkpoint_paths()[-1], None
        if exists(run.averaged):
            yield run.path.name, "averaged", run.averaged, None
    folder = workspace / FUSED.parent
    exported = sorted((read_metadata(path).repeats, path) for path in folder.glob("*.onnx"))
    most = exported[-1][0] if exported else 1
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path) as file:
            if file.kind != "fused":
                continue  # predictions, which a user may keep there too
            dtype = "+".join(dtypes_of(file.metadata_as(FusedMetadata).members))
        for repeats in sorted({1, most}):
            yield ENSEMBLE, f"fused {dtype}", path, repeats
    for _, path in exported:
        yield ENSEMBLE, "onnx", path, None
