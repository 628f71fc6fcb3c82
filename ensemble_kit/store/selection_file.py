"""Selection files: what ``select`` writes and ``fuse`` and ``report`` read. Imports no stage."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ensemble_kit.choices import Criterion, Dtype, Mixing, Strategy
from ensemble_kit.errors import SelectionError
from ensemble_kit.files import written_aside
from ensemble_kit.store.provenance import FileMetadata, Metadata, ModelMetadata
from ensemble_kit.validation import complaints

Interval = tuple[float, float]


class SelectedMetadata(Metadata):
    """One member of a selection.

    Attributes:
        name: The name of its predictions.
        coefficient: What its probabilities are multiplied by; the members' sum to 1.
        bytes: What it will take in the fused file; 0 where its size was not told.
        gap: The GAP of the member alone, on all videos.
        gap_without: The GAP of the other members, on all videos; 0 where there is no other.
        predictions: The predictions it was selected by.
        model: The model that made them, its path relative to the selection; None for a CSV file.
    """

    name: str
    coefficient: float
    bytes: int
    gap: float
    gap_without: float
    predictions: FileMetadata
    model: ModelMetadata | None


class StepMetadata(Metadata):
    """One addition, and what all members so far have then.

    Attributes:
        added: The member's name; with replacement it may come more than once.
        gap: The GAP of all members then, on the videos that selection chose by.
        gain: What the addition changed; the first step's is its GAP.
        bytes: What all members take then.
        confirmed_gap: The GAP on the videos held out; None where none were. So for
            ``confirmed_gain``.
        interval: A bootstrap interval of the GAP, on the videos held out if there are any, else on
            those chosen by; None where no resample was taken. So for ``gain_interval``.
        is_distinguishable: Whether the gain's interval lies above 0; None without one.
    """

    added: str
    gap: float
    gain: float
    bytes: int
    confirmed_gap: float | None
    confirmed_gain: float | None
    interval: Interval | None
    gain_interval: Interval | None
    is_distinguishable: bool | None


class FrontierMetadata(Metadata):
    """An ensemble that no other one measured beats with as few bytes.

    Attributes:
        members: Their names; with replacement one may come more than once.
        gap: Their GAP on the videos that selection chose by.
        confirmed_gap: The GAP on the videos held out; None where none were.
        bytes: What they take together.
    """

    members: tuple[str, ...]
    gap: float
    confirmed_gap: float | None
    bytes: int


class CandidateMetadata(Metadata):
    """What selection could choose from, best first.

    Attributes:
        gap: The GAP of the candidate alone, on the videos that selection chose by.
        confirmed_gap: The GAP on the videos held out; None where none were.
        bytes: What it would take in the fused file; 0 where its size was not told.
        bytes_by_dtype: The same for each type it could be fused in; None where no model of the kit
            made the predictions.
        num_values: Numbers that ``fuse`` would store for it; None as above.
        skipped: Why it is no member; None for a member.
        predictions: The file of its predictions, its path relative to the selection.
        top_k: How many classes of a video that file keeps; None where it keeps all, or the number
            differs.
    """

    name: str
    gap: float
    confirmed_gap: float | None
    bytes: int
    bytes_by_dtype: dict[str, int] | None
    num_values: int | None
    skipped: str | None
    predictions: FileMetadata
    top_k: int | None


class PartMetadata(Metadata):
    """Some of the videos, and what the members score there.

    Attributes:
        videos: How many there are; so for ``positives``.
        gap: The GAP of the members' weighted mean.
        interval: A bootstrap interval of it; None where no resample was taken.
    """

    videos: int
    positives: int
    gap: float
    interval: Interval | None


class ConfirmMetadata(Metadata):
    """How the videos were split in those to choose by and those held out.

    Attributes:
        fraction: The share of videos held out, by the hash of their ids.
        chosen_by: The videos that selection chose by.
        held_out: The videos that it did not look at.
    """

    fraction: float
    chosen_by: PartMetadata
    held_out: PartMetadata


class SearchMetadata(Metadata):
    """How members were looked for.

    Attributes:
        strategy: ``greedy`` adds one member after the other, each once; ``replacement`` may add one
            again, which counts it more; ``beam`` follows the ``beam_width`` best ensembles;
            ``exhaustive`` measures every ensemble that fits.
        criterion: What an addition is chosen by.
        max_members: The most members; with replacement, the most additions. None for no limit.
        beam_width: How many ensembles a beam search follows; None for other strategies.
        start: Members that were set beforehand, by name; so for ``excluded``.
        evaluations: How many ensembles were measured.
        greedy_gap: The GAP that ``greedy`` reaches on the videos chosen by; None where that is the
            strategy.
    """

    strategy: Strategy
    criterion: Criterion
    max_members: int | None
    beam_width: int | None
    start: tuple[str, ...]
    excluded: tuple[str, ...]
    evaluations: int
    greedy_gap: float | None


class OptimisedMetadata(Metadata):
    """What optimising the mixing coefficients brought over the uniform mean of the same members.

    Attributes:
        uniform_gap: The GAP of the uniform mean, on the videos that selection chose by.
        gap: The GAP of the optimised mean, on the same.
        confirmed_uniform_gap: ``uniform_gap`` on the videos held out; None where none were.
        confirmed_gap: ``gap`` on the videos held out.
    """

    uniform_gap: float
    gap: float
    confirmed_uniform_gap: float | None
    confirmed_gap: float | None


class BootstrapMetadata(Metadata):
    """How intervals were made: videos drawn with replacement.

    Attributes:
        resamples: How many times; 0 makes no interval.
        level: The share of resamples within an interval.
        seed: The seed of the draws.
    """

    resamples: int
    level: float
    seed: int


class TruncationMetadata(Metadata):
    """What classes that some predictions left out could change.

    Attributes:
        candidates: The names of those that keep some classes of each video only.
        gap_bounds: Between these the GAP of the members lies, on the videos that selection chose
            by, whatever the probabilities left out are.
        is_decided: Whether the same members would be chosen, whatever they are; None where bounds
            do not tell: for a beam search, and where members are mixed by their own GAPs.
    """

    candidates: tuple[str, ...]
    gap_bounds: Interval
    is_decided: bool | None


class SelectionMetadata(Metadata):
    """A selection: what ``selection.json`` holds.

    Attributes:
        k: The k of every GAP in it.
        dtype: The type that members' bytes were counted in.
        max_size: The most bytes that the members together may take.
        mixing: How the members' probabilities are mixed: ``uniform`` is their mean, ``gap`` counts
            each by its own GAP, ``optimised`` by what gives the best GAP.
        rule: How members were chosen, in words.
        search: How members were chosen, in numbers.
        dataset_sha256: The hash of video ids and labels in order.
        vocabulary_sha256: The hash of the class names; None where every candidate is a CSV file.
        labels: The file of labels; None where the predictions' own were taken.
        videos: All videos; so for ``positives``.
        left_out: Videos that not every file has.
        gap: The GAP of the members' weighted mean on all videos.
        bytes: What all members take together.
        members: In the order in which they were added.
        path: The additions that led to the members.
        frontier: By bytes: the best of all ensembles that were measured with as few.
        candidates: Best first.
        confirm: How the videos were split; None where all were chosen by.
        bootstrap: How intervals were made.
        optimised: None unless ``mixing`` is ``optimised``.
        truncation: None where every candidate keeps every class.
    """

    kind: Literal["selection"] = "selection"
    kit_version: str
    k: int
    dtype: Dtype
    max_size: int
    mixing: Mixing
    rule: str
    search: SearchMetadata
    dataset_sha256: str
    vocabulary_sha256: str | None
    labels: FileMetadata | None
    videos: int
    left_out: int = 0
    positives: int
    gap: float
    bytes: int
    members: Annotated[tuple[SelectedMetadata, ...], Field(min_length=1)]
    path: tuple[StepMetadata, ...]
    frontier: tuple[FrontierMetadata, ...]
    candidates: tuple[CandidateMetadata, ...]
    confirm: ConfirmMetadata | None
    bootstrap: BootstrapMetadata
    optimised: OptimisedMetadata | None
    truncation: TruncationMetadata | None


def read_selection(path: Path) -> SelectionMetadata:
    """Read a ``selection.json`` strictly.

    Raises:
        SelectionError: The file is missing, or is not a selection of this version's form.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SelectionError(
            f"{path} cannot be read: {error.strerror}.",
            hint="Run `ensemble-kit select` first, or name a selection that exists.",
        ) from error
    try:
        return SelectionMetadata.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = complaints(error, SelectionMetadata, owner="a selection")[0]
        raise SelectionError(
            f"{path} is not a selection: {first.problem}.",
            hint="Make it again with `ensemble-kit select`.",
        ) from error


def write_selection(path: Path, selection: SelectionMetadata, *, force: bool) -> None:
    """Write a selection as indented JSON.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    with written_aside(path, force=force) as aside:
        aside.write_text(selection.model_dump_json(indent=2) + "\n", encoding="utf-8")
