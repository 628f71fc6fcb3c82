"""Average the checkpoints of one run: arXiv:1803.05407 (SWA); arXiv:1810.00207, section 3.3.

A mean of weights is good only where the checkpoints lie in one basin of the loss. So where there
are validation records it is compared with each single checkpoint, as arXiv:2203.05482 (model soups)
does.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ensemble_kit.averaging.average import Average, Observer
from ensemble_kit.choices import BATCH_NORM_RULE, DEVICE, METHOD, AnyPath, BatchNormRule, Method
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import check_fits
from ensemble_kit.errors import AveragingError, CheckpointError, RecordError
from ensemble_kit.files import each_path, refuse_overwrite, require_suffix
from ensemble_kit.networks.building import TrainedModel
from ensemble_kit.networks.loading import load
from ensemble_kit.networks.running import require_device
from ensemble_kit.progress import progress
from ensemble_kit.store.provenance import BatchNormSource, CheckpointMetadata
from ensemble_kit.store.tensor_files import STATISTICS, TensorFile, TensorSpec, open_tensors
from ensemble_kit.wording import counted


@dataclass(frozen=True)
class GreedyStep:
    """A checkpoint that was tried, the GAP of the mean with it, and whether it was added."""

    path: Path
    gap: float
    is_added: bool


@dataclass(frozen=True)
class AveragedRun:
    """The outcome of averaging.

    Attributes:
        path: The file that was written; None if the average lost and was not wanted.
        method: How the average was made.
        batch_norm: Where its batch-norm statistics come from; ``trained`` if greedy averaging
            kept a single checkpoint as it is.
        used: The checkpoints that were averaged, by step, or the exponential moving average.
        gap: Its validation GAP@20; None where nothing was compared.
        best: The best single checkpoint that it was compared with, if any.
        best_gap: The validation GAP@20 of ``best``.
        is_better: Whether ``gap`` is at least ``best_gap``; None where nothing was compared.
        steps: What greedy averaging tried, beginning with the best checkpoint alone.
    """

    path: Path | None
    method: Method
    batch_norm: BatchNormSource
    used: tuple[Path, ...]
    gap: float | None
    best: Path | None
    best_gap: float | None
    is_better: bool | None
    steps: tuple[GreedyStep, ...]

    @property
    def description(self) -> str:
        """What was averaged, in words: ``the mean of 5 checkpoints``."""
        if self.method == "ema":
            return "the exponential moving average"
        return f"the mean of {counted(len(self.used), 'checkpoint')}"

    def require_written(self) -> None:
        """Raise ``AveragingError`` if the average lost to a single checkpoint and was not kept."""
        if self.path is None:
            raise AveragingError(
                f"{self.description.capitalize()} has a validation GAP@20 of {self.gap:.5f}, but "
                f"{self.best} alone has {self.best_gap:.5f}; nothing was written.",
                hint="Use that checkpoint, or write the average anyway with --even-if-worse.",
            )


def average_checkpoints(
    paths: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    *,
    method: Method = METHOD,
    batch_norm: BatchNormRule = BATCH_NORM_RULE,
    training: Records | None = None,
    validation: Records | None = None,
    known_gaps: Mapping[Path, float] | None = None,
    observe: Observer | None = None,
    even_if_worse: bool = False,
    device: str = DEVICE,
    force: bool = False,
) -> AveragedRun:
    """Average the checkpoints of one run into a new one, unless one of them alone is better.

    Floating tensors become the uniform mean, summed in float64, and integer ones, which count
    things, the largest. S5 averaged this way, but kept the batch-norm statistics of the last
    checkpoint, which is the option ``last``. By default ours are estimated again, as in the SWA
    paper, because neither the last statistics nor their mean are those of the averaged weights.

    Where there are validation records, the average's GAP@20 is compared with that of each single
    checkpoint, and an average below the best of them is not written. GAPs are measured as training
    measures them, with one fixed draw of frames.

    Args:
        paths: Checkpoints of one run.
        output: The file to write.
        method: ``uniform`` averages all. ``greedy`` goes through them from the best GAP down and
            adds each one that raises the GAP of the mean (model soups, recipe 1, which adds at
            equal GAPs too). ``ema`` takes the one exponential moving average among them, and
            compares it with the others.
        batch_norm: ``recalibrate`` estimates the statistics on training records, ``average``
            averages them, and ``last`` takes those of the last step, in each case before a GAP is
            measured. For ``ema``, ``average`` means the statistics that the file holds, which
            training averaged over steps like the weights, and ``last`` those of the last of the
            other checkpoints.
        training: The records for ``recalibrate``; None reads those that the checkpoints name.
        validation: The records to compare on; None reads those that the checkpoints name if they
            still exist, and compares nothing otherwise.
        known_gaps: GAP@20 of single checkpoints on the validation records. These are not measured
            again, and the average is compared with them even if they are not in ``paths``.
        observe: Called with each validation batch and its probabilities, ``(B, C)`` float32, for
            each average that is measured: with ``greedy``, for each one that is tried.
        even_if_worse: Whether an average that loses is written too.
        device: Where to recalibrate and measure, ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Raises:
        CheckpointError: A file is missing or damaged, the files are of different runs or not those
            that the method needs, or the training records are not where they say.
        AveragingError: There are no validation records for ``greedy``.
        RecordError: None of the records is good.
        PredictionsError: They are not of the checkpoints' modalities or vocabulary.
        ProviderError: There is no such device.
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        ValueError: No checkpoints were named.
    """
    if not paths:
        raise ValueError("there are no checkpoints to average")
    output = Path(output)
    refuse_overwrite(output, force=force)
    require_suffix(output, ".safetensors")
    require_device(device)
    with ExitStack() as stack:
        files = _open(paths, stack)
        moving, singles = _split(files, method, batch_norm)
        sources = moving or singles
        training = _training_records(training, sources[-1], batch_norm)
        validation = _validation_records(validation, sources[-1], method)
        average = Average(sources, batch_norm, (singles or moving)[-1], training, device)
        if validation is None:
            measured = _Measured(average, average.model() if average.is_estimated else None)
        else:
            gaps = _gaps_alone(singles, known_gaps or {}, validation, device)
            if method == "greedy":
                measured = _try_greedily(average, gaps, validation, observe)
            else:
                model = average.model()
                gap = average.gap(model, validation, observe)
                measured = _Measured(average, model, gap, gaps)
        outcome = measured.outcome(output, method)
        if outcome.is_better is False and not even_if_worse:
            return replace(outcome, path=None)
        measured.average.write(output, measured.model, gap=measured.gap, force=force)
    return outcome


class _Measured(NamedTuple):
    """An average, and what it has been compared with.

    Attributes:
        average: The average.
        model: Its model, where it has been built.
        gap: Its validation GAP@20; None where nothing was compared.
        gaps: That of every single checkpoint.
        steps: What greedy averaging tried.
    """

    average: Average
    model: TrainedModel | None
    gap: float | None = None
    gaps: Mapping[Path, float] = MappingProxyType({})
    steps: tuple[GreedyStep, ...] = ()

    def outcome(self, output: Path, method: Method) -> AveragedRun:
        """Return the outcome of writing it."""
        best = max(sorted(self.gaps), key=self.gaps.__getitem__, default=None)  # earliest of equals
        best_gap = None if best is None else self.gaps[best]
        return AveragedRun(
            path=output,
            method=method,
            batch_norm=self.average.batch_norm,
            used=tuple(file.path for file in self.average.sources),
            gap=self.gap,
            best=best,
            best_gap=best_gap,
            is_better=None if self.gap is None or best_gap is None else self.gap >= best_gap,
            steps=self.steps,
        )


def _open(paths: AnyPath | Sequence[AnyPath], stack: ExitStack) -> list[TensorFile]:
    """Open checkpoints, sorted by step; refuse what cannot be averaged."""
    named = dict.fromkeys(map(Path, each_path(paths)))
    files = sorted((stack.enter_context(open_tensors(path)) for path in named), key=_step)
    _refuse_mixture(files)
    return files


def _gaps_alone(
    files: Sequence[TensorFile], known: Mapping[Path, float], validation: Records, device: str
) -> dict[Path, float]:
    """Return the GAP of every single checkpoint; those that are not known are measured."""
    gaps = dict(known)
    waiting = [file.path for file in files if file.path not in known]
    with progress("measure", len(waiting)) as shown:
        for done, path in enumerate(waiting, start=1):
            gaps[path] = load(path, device=device).measure(validation).gap
            shown.update(done, f"{path.name}  GAP {gaps[path]:.4f}")
    return gaps


def _try_greedily(
    whole: Average, gaps: Mapping[Path, float], validation: Records, observe: Observer | None
) -> _Measured:
    """Add checkpoints to the best one, from the best GAP down, if they raise the mean's GAP.

    Args:
        whole: The mean of all, whose sources are sorted by step: those of equal GAP are tried so.
        gaps: The GAP of each checkpoint alone.
        validation: The records to measure on.
        observe: See ``average_checkpoints``.
    """
    first, *others = sorted(whole.sources, key=lambda file: -gaps[file.path])
    chosen, best = [first], gaps[first.path]
    steps = [GreedyStep(first.path, best, is_added=True)]
    with progress("greedy", len(others)) as shown:
        for done, file in enumerate(others, start=1):
            trial = sorted([*chosen, file], key=_step)
            average = replace(whole, sources=trial, newest=trial[-1])
            gap = average.gap(average.model(), validation, observe)
            is_added = gap > best
            steps.append(GreedyStep(file.path, gap, is_added))
            if is_added:
                chosen, best = trial, gap
            shown.update(done, f"{file.path.name}  GAP {gap:.4f}")
    rule = whole.batch_norm if len(chosen) > 1 else "trained"
    average = replace(whole, sources=chosen, newest=chosen[-1], batch_norm=rule)
    return _Measured(average, average.model(), best, gaps, tuple(steps))


def _training_records(
    training: Records | None, file: TensorFile, batch_norm: BatchNormRule
) -> Records | None:
    """Return the records to estimate statistics on; None if there are no statistics to estimate."""
    if batch_norm != "recalibrate" or not _has_statistics(file):
        return None
    metadata = file.metadata_as(CheckpointMetadata)
    try:
        training = training or Records(metadata.training_files, schema=metadata.data_schema)
    except RecordError as error:
        raise CheckpointError(
            f"{file.path} was trained on records that are gone: {error.problem}",
            hint="Name training records with --data, or use --batch-norm last.",
        ) from error
    check_fits(metadata.data_schema, training.schema, path=file.path)
    return training


def _validation_records(
    validation: Records | None, file: TensorFile, method: Method
) -> Records | None:
    """Return the records to compare on; None if none are named, or the named ones are gone."""
    metadata = file.metadata_as(CheckpointMetadata)
    if validation is None and metadata.validation_files:
        with suppress(RecordError):
            validation = Records(metadata.validation_files, schema=metadata.data_schema)
    if validation is not None:
        check_fits(metadata.data_schema, validation.schema, path=file.path)
    elif method == "greedy":
        raise AveragingError(
            f"{file.path} names no validation records that exist, and greedy averaging needs some.",
            hint="Name validation records with --validation, or use --method uniform.",
        )
    return validation


def _split(
    files: Sequence[TensorFile], method: Method, batch_norm: BatchNormRule
) -> tuple[list[TensorFile], list[TensorFile]]:
    """Return the exponential moving average, if the method takes one, and the other checkpoints."""
    is_moving = [file.metadata_as(CheckpointMetadata).ema_decay is not None for file in files]
    moving = list(compress(files, is_moving))
    singles = [file for file in files if file not in moving]
    if method != "ema" and moving:
        raise CheckpointError(
            f"{moving[0].path} is an exponential moving average.",
            hint="Use it with --method ema, or name checkpoints of single steps.",
        )
    if method == "ema" and len(moving) != 1:
        raise CheckpointError(
            f"--method ema needs one exponential moving average; {len(moving)} were named.",
            hint="Name the ema.safetensors of one run.",
        )
    if moving and not singles and batch_norm == "last" and _has_statistics(moving[0]):
        raise CheckpointError(
            f"{moving[0].path} holds averages of statistics, not those of the last step.",
            hint="Name the last checkpoint of its run too, or use another --batch-norm.",
        )
    return moving, singles


def _refuse_mixture(files: Sequence[TensorFile]) -> None:
    first = files[0]
    run = first.metadata_as(CheckpointMetadata).run
    for file in files[1:]:
        different = _differences(first.specs, file.specs)
        if different:
            raise CheckpointError(
                f"{file.path} and {first.path} hold different tensors ({different[0]}, ...).",
                hint="Average checkpoints of one run only: same recipe, same architecture.",
            )
        if file.metadata_as(CheckpointMetadata).run != run:
            raise CheckpointError(
                f"{file.path} and {first.path} belong to different runs.",
                hint="Average checkpoints of one run only: same recipe, seed and records.",
            )
    for file in files:
        if file.metadata_as(CheckpointMetadata).averaged_from:
            raise CheckpointError(
                f"{file.path} is already an average.",
                hint="Name the checkpoints of its steps instead.",
            )


def _differences(one: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _has_statistics(file: TensorFile) -> bool:
    return any(name.endswith(STATISTICS) for name in file.specs)


def _step(file: TensorFile) -> int:
    return file.metadata_as(CheckpointMetadata).step
