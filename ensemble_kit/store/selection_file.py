"""Selection files: what ``select`` writes and ``fuse`` and ``report`` read.

Every score is by the selection's metric, and on the selection videos, those that members were
chosen on, unless it says otherwise.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from ensemble_kit.choices import Criterion, Dtype, Given, Metric, Mixing, Strategy
from ensemble_kit.errors import SelectionError
from ensemble_kit.files import written_aside
from ensemble_kit.store.provenance import (
    Count,
    FileMetadata,
    Metadata,
    ModelMetadata,
    Sha256,
    TopK,
)
from ensemble_kit.validation import complaints
from ensemble_kit.wording import metric_name

Interval = tuple[float, float]


class SelectedMetadata(Metadata):
    """One member of a selection.

    Attributes:
        name: The name of its predictions.
        dtype: The precision that it was chosen in; None where no model of the kit made it.
        coefficient: What its probabilities are multiplied by; the coefficients sum to 1.
        bytes: What it will take in the fused file; 0 where its size is not known.
        score: The score of the member alone, on all videos.
        score_without: The score of the other members, on all videos; 0 where there is no other.
        predictions: The predictions that it was selected by.
        model: The model that made them, its path relative to the selection; None for a CSV file.
    """

    name: str
    dtype: Dtype | None
    coefficient: float
    bytes: int
    score: float
    score_without: float
    predictions: FileMetadata
    model: ModelMetadata | None

    @model_validator(mode="after")
    def _agrees(self) -> "SelectedMetadata":
        if (
            self.model is not None
            and self.dtype is not None
            and not self.model.measures(self.dtype)
        ):
            measured = self.model.dtype or "the precision of its checkpoint"
            raise ValueError(
                f"member {self.name} is in {self.dtype}, but was measured in {measured}"
            )
        return self


class StepMetadata(Metadata):
    """One addition, and the ensemble of all members so far.

    Attributes:
        added: The member's name; with replacement it may be added more than once.
        dtype: Its precision, as in ``SelectedMetadata``.
        score: The score of the ensemble.
        gain: What the addition changed; for the first step, its score.
        bytes: What the ensemble takes, with what its members share.
        confirmed_score: The score on the held-out videos; None where none were held out.
        confirmed_gain: The gain on the held-out videos; None where none were held out.
        interval: A bootstrap interval of the score, on the held-out videos if there are any, else
            on the selection videos; None without resamples.
        gain_interval: A bootstrap interval of the gain, on the same videos.
        is_distinguishable: Whether the gain's interval lies above 0; None without an interval.
    """

    added: str
    dtype: Dtype | None
    score: float
    gain: float
    bytes: int
    confirmed_score: float | None
    confirmed_gain: float | None
    interval: Interval | None
    gain_interval: Interval | None
    is_distinguishable: bool | None


class FrontierMetadata(Metadata):
    """An ensemble that is better than every smaller one that was measured.

    Attributes:
        members: Their names; with replacement a name may be there more than once.
        dtypes: The precision of each, as in ``SelectedMetadata``.
        score: The score of the ensemble.
        confirmed_score: The score on the held-out videos; None where none were held out.
        bytes: What the ensemble takes, with what its members share.
    """

    members: tuple[str, ...]
    dtypes: tuple[Dtype | None, ...]
    score: float
    confirmed_score: float | None
    bytes: int


class CandidateMetadata(Metadata):
    """A candidate that selection could choose.

    Attributes:
        dtype: The precision that it stands in, as in ``SelectedMetadata``.
        score: The score of the candidate alone.
        confirmed_score: The score on the held-out videos; None where none were held out.
        bytes: What it would take in the fused file; 0 where its size is not known.
        bytes_by_dtype: What it would take in each precision; None where no model of the kit made
            the predictions.
        num_values: How many numbers ``fuse`` would store for it; None as for ``bytes_by_dtype``.
        skipped: Why it is not a member; None for a member.
        predictions: The file of its predictions, its path relative to the selection.
        top_k: How many classes of each video the file keeps; None where it keeps all, or where the
            number differs from video to video.
    """

    name: str
    dtype: Dtype | None
    score: float
    confirmed_score: float | None
    bytes: int
    bytes_by_dtype: dict[str, int] | None
    num_values: int | None
    skipped: str | None
    predictions: FileMetadata
    top_k: int | None


class PartMetadata(Metadata):
    """Some of the videos, and what the members score on them.

    Attributes:
        videos: The number of videos.
        positives: The number of their labels.
        score: The score of the members' weighted mean on them.
        interval: A bootstrap interval of that score; None without resamples.
    """

    videos: int
    positives: int
    score: float
    interval: Interval | None


class ConfirmMetadata(Metadata):
    """How the videos were split into selection videos and held-out videos.

    Attributes:
        fraction: The share of the videos that were held out, by the hash of their ids.
        chosen_by: The selection videos.
        held_out: The held-out videos, which the search did not look at.
    """

    fraction: float
    chosen_by: PartMetadata
    held_out: PartMetadata


class SearchMetadata(Metadata):
    """How members were searched for.

    Attributes:
        strategy: ``greedy`` adds one member after the other, each once; ``replacement`` may add a
            member again, which gives it more weight; ``beam`` follows the ``beam_width`` best
            ensembles; ``exhaustive`` measures every ensemble that fits; ``given`` is no search: the
            members were named with their coefficients.
        criterion: What an addition is chosen by.
        max_members: The most members; with replacement, the most additions. None for no limit.
        beam_width: How many ensembles a beam search follows; None for other strategies.
        start: The members that the search started with, by name.
        excluded: The candidates that were left out, by name.
        evaluations: How many ensembles were measured.
        greedy_score: The score that ``greedy`` reaches; None where ``greedy`` is the strategy, or
            where nothing was chosen.
        greedy_path: The members that ``greedy`` would choose, in order; None as for
            ``greedy_score``.
    """

    strategy: Strategy | Given
    criterion: Criterion
    max_members: int | None
    beam_width: int | None
    start: tuple[str, ...]
    excluded: tuple[str, ...]
    evaluations: int
    greedy_score: float | None
    greedy_path: tuple[str, ...] | None = None


class OptimisedMetadata(Metadata):
    """What optimised mixing coefficients gained over the uniform mean of the same members.

    Attributes:
        uniform_score: The score of the uniform mean.
        score: The score of the optimised mean.
        confirmed_uniform_score: ``uniform_score`` on the held-out videos; None where none were held
            out.
        confirmed_score: ``score`` on the held-out videos; None where none were held out.
    """

    uniform_score: float
    score: float
    confirmed_uniform_score: float | None
    confirmed_score: float | None


class BootstrapMetadata(Metadata):
    """How intervals were made: videos drawn with replacement.

    Attributes:
        resamples: How often; with 0 there are no intervals.
        level: The share of the resamples within an interval.
        seed: The seed of the draws.
    """

    resamples: int
    level: float
    seed: int


class TruncationMetadata(Metadata):
    """What the classes that some predictions files left out could change.

    Attributes:
        candidates: The names of the candidates whose files keep only some classes of each video.
        score_bounds: Between these the score of the members lies, whatever the left-out
            probabilities are.
        is_decided: Whether the same members would be chosen, whatever the left-out probabilities
            are; None where bounds cannot say: for a beam search, where members are mixed in
            proportion to their own GAPs, and where more than 1,000 ensembles were measured.
    """

    candidates: tuple[str, ...]
    score_bounds: Interval
    is_decided: bool | None


class SelectionMetadata(Metadata):
    """A selection: what ``selection.json`` holds.

    Attributes:
        metric: What members were chosen by; see ``select``. Every score in the file is by it.
        k: The k of GAP@k and mAP@k, and how many classes a fused file lists for a video.
        dtypes: The precisions that candidates stand in, finest first.
        max_size: Maximum size of the fused file, in bytes.
        mixing: How the members' probabilities are mixed: ``uniform`` is their mean, ``gap`` weights
            each by its own score, ``optimised`` by coefficients that were optimised, ``given`` by
            coefficients that ``select`` was given.
        rule: How members were chosen, in words.
        search: How members were chosen, in numbers.
        dataset_sha256: The hash of video ids and labels in order.
        vocabulary_sha256: The hash of the class names; None where every candidate is a CSV file.
        labels: The file of labels; None where they came from the predictions files.
        videos: The number of all videos.
        positives: The number of their labels.
        left_out: The number of videos that not every file has.
        score: The score of the members' weighted mean, on all videos.
        bytes: What the fused file takes: its members, and what they share.
        shared_bytes: What they share; 0 where no candidate can be fused.
        members: The members, in the order in which they were added.
        path: The additions that led to the members.
        frontier: For each size, the best ensemble measured that is no larger.
        frontiers: The same for the ensembles of each one precision; empty where candidates stand in
            one only.
        candidates: The candidates, best first.
        confirm: How the videos were split; None where no videos were held out.
        bootstrap: How intervals were made.
        optimised: None unless ``mixing`` is ``optimised``.
        truncation: None where every candidate keeps every class.
    """

    kind: Literal["selection"] = "selection"
    kit_version: str
    metric: Metric
    k: TopK
    dtypes: tuple[Dtype, ...]
    max_size: int
    mixing: Mixing | Given
    rule: str
    search: SearchMetadata
    dataset_sha256: Sha256
    vocabulary_sha256: Sha256 | None
    labels: FileMetadata | None
    videos: Count
    left_out: Count = 0
    positives: Count
    score: float
    bytes: Count
    shared_bytes: Count
    members: Annotated[tuple[SelectedMetadata, ...], Field(min_length=1)]
    path: tuple[StepMetadata, ...]
    frontier: tuple[FrontierMetadata, ...]
    frontiers: dict[Dtype, tuple[FrontierMetadata, ...]]
    candidates: tuple[CandidateMetadata, ...]
    confirm: ConfirmMetadata | None
    bootstrap: BootstrapMetadata
    optimised: OptimisedMetadata | None
    truncation: TruncationMetadata | None

    @model_validator(mode="after")
    def _agrees(self) -> "SelectionMetadata":
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError(f"two members share a name: {', '.join(names)}")
        return self

    @property
    def metric_name(self) -> str:
        """What people call the metric, such as ``GAP@20``."""
        return metric_name(self.metric, self.k)

    @property
    def precisions(self) -> str:
        """The precisions that members are in, in words; empty where no model of the kit is one."""
        found = {member.dtype for member in self.members}
        return " and ".join(dtype for dtype in self.dtypes if dtype in found)

    def label(self, name: str, dtype: Dtype | None) -> str:
        """Return what to call a candidate: its name, with its precision if there are several."""
        return name if dtype is None or len(self.dtypes) < 2 else f"{name} ({dtype})"


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
