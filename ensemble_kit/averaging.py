"""Average the checkpoints of one run: arXiv:1803.05407 (SWA); arXiv:1810.00207, section 3.3."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os.path import relpath
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import ensemble_kit
from ensemble_kit.checkpoints import (
    TensorFile,
    TensorSpec,
    open_tensors,
    save_tensors,
    write_tensors,
)
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError
from ensemble_kit.files import refuse_overwrite, sha256_of, written_aside
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import WhitenedResiduals
from ensemble_kit.loading import check_fits, load_sub_model, not_finite, to_torch
from ensemble_kit.provenance import CheckpointRecord, FileRecord

BatchNormRule = Literal["recalibrate", "average", "last"]
STATISTICS = ("running_mean", "running_variance")
RECALIBRATION_VIDEOS = 8192
RECALIBRATION_BATCH = 256


def average_checkpoints(
    paths: Sequence[Path],
    output: Path,
    *,
    batch_norm: BatchNormRule = "recalibrate",
    training: Records | None = None,
    force: bool = False,
) -> Path:
    """Average the checkpoints of one run, tensor by tensor, into a new checkpoint.

    Floating tensors become the uniform mean, summed in float64; integer ones, which count things,
    the largest. Only one tensor of each file is in memory at a time. S5 averaged this way, but kept
    the batch-norm statistics of the last checkpoint, which is the option ``last``; by default ours
    are estimated again, as the SWA paper does, because those of the averaged weights are neither.

    Args:
        paths: Checkpoints of one run.
        output: The file to write.
        batch_norm: ``recalibrate`` estimates the statistics on training records, ``average``
            averages them, ``last`` takes those of the last step.
        training: The records for ``recalibrate``; None reads those the checkpoints name.
        force: Whether an existing file may be replaced.

    Raises:
        CheckpointError: A file is missing or damaged, the files are of different runs, or the
            training records are not where they say.
        RecordError: None of the training records is good.
        PredictionsError: They are not of the checkpoints' modalities or vocabulary.
        OutputError: ``output`` exists and ``force`` is False.
    """
    refuse_overwrite(output, force=force)
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path)) for path in paths]
        files.sort(key=lambda file: file.record(CheckpointRecord).step)
        _refuse_mixture(files)
        record = _record_of_average(files, output, batch_norm)
        has_statistics = any(name.endswith(STATISTICS) for name in files[0].specs)

        def mean_of(name: str) -> Tensor:
            is_last = batch_norm == "last" and name.endswith(STATISTICS)
            return mean_tensor([_finite(file, name) for file in (files[-1:] if is_last else files)])

        if batch_norm != "recalibrate" or not has_statistics:
            write_tensors(output, files[0].specs, mean_of, record, force=force)
            return output
        records = training or _recorded(record, files[-1].path)
        check_fits(record.data_schema, records.schema, path=files[-1].path)
        with written_aside(output, force=force) as aside:
            write_tensors(aside, files[0].specs, mean_of, record, force=True)
            with open_tensors(aside) as averaged:
                model = load_sub_model(averaged)
            recalibrate(model, records, num_videos=RECALIBRATION_VIDEOS)
            save_tensors(aside, model.state_dict(), record, force=True)
    return output


def mean_tensor(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of floating tensors, in their type, or the largest of integer ones.

    The sum is in float64, so copies of one float32 tensor average to themselves exactly.
    """
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).amax(dim=0)
    total = tensors[0].to(torch.float64)
    for tensor in tensors[1:]:
        total = total + tensor
    return (total / len(tensors)).to(tensors[0].dtype)


@torch.no_grad()
def recalibrate(model: torch.nn.Module, records: Records, *, num_videos: int) -> None:
    """Estimate the statistics of every batch norm and whitening again.

    On the first videos in training order. Each layer's running statistics become the mean of the
    batches' own, every batch counting the same, as in arXiv:1803.05407, section 3.2. The weights
    stay as they are, and only layers with statistics run as in training: dropout would widen what
    the layers behind it see.
    """
    layers = [part for part in model.modules() if isinstance(part, (BatchNorm, WhitenedResiduals))]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_statistics()
        layer.momentum = None
        layer.train()
    torch.manual_seed(0)  # the draws of random sampling: the same average for the same files
    seen = 0
    for batch in records.training_batches(RECALIBRATION_BATCH, seed=0):
        model(*to_torch(batch, "cpu"))
        seen += len(batch.ids)
        if seen >= num_videos:
            break
    model.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _finite(file: TensorFile, name: str) -> Tensor:
    tensor = file.tensor(name)
    if not bool(tensor.isfinite().all()):
        raise not_finite(file.path, name)
    return tensor


def _recorded(record: CheckpointRecord, path: Path) -> Records:
    try:
        return Records(record.training_files, schema=record.data_schema)
    except ensemble_kit.errors.RecordError as error:
        raise CheckpointError(
            f"{path} was trained on records that are gone: {error.fault}",
            mend="Name training records with --data, or use --batch-norm last.",
        ) from error


def _refuse_mixture(files: Sequence[TensorFile]) -> None:
    first = files[0]
    run = first.record(CheckpointRecord).run
    for file in files[1:]:
        strangers = _differences(first.specs, file.specs)
        if strangers:
            raise CheckpointError(
                f"{file.path} and {first.path} hold different tensors ({strangers[0]}, ...).",
                mend="Average checkpoints of one run only: same recipe, same architecture.",
            )
        if file.record(CheckpointRecord).run != run:
            raise CheckpointError(
                f"{file.path} and {first.path} are of different runs.",
                mend="Average checkpoints of one run only: same recipe, seed and records.",
            )
    for file in files:
        if file.record(CheckpointRecord).averaged_from:
            raise CheckpointError(
                f"{file.path} is an average already.",
                mend="Name the checkpoints of its steps instead.",
            )


def _differences(one: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _record_of_average(
    files: Sequence[TensorFile], output: Path, batch_norm: BatchNormRule
) -> CheckpointRecord:
    parents = tuple(
        FileRecord(path=relpath(file.path, output.parent), sha256=sha256_of(file.path))
        for file in files
    )
    last = files[-1].record(CheckpointRecord)
    return last.model_copy(
        update={
            "kit_version": ensemble_kit.__version__,
            "averaged_from": parents,
            "batch_norm": batch_norm,
        }
    )
