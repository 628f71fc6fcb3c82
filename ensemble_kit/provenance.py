"""What each file says of itself: the strict records in the metadata of every file of the kit.

Imports ``errors`` and ``data.schema``. Nothing here reads or writes a file.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ensemble_kit.data.schema import Schema

Dtype = Literal["fp32", "fp16", "bf16", "int8"]
Mixing = Literal["uniform", "gap"]
# int8: the small rest, which is bf16, is not counted
BYTES_PER_VALUE: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


class Record(BaseModel):
    """A record read strictly: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """A file and what it held: ``path`` is relative to the folder of the file that names it."""

    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RecipeRecord(Record):
    """A recipe as it was run: its name, its text and the ``--set`` values over it."""

    name: str
    text: str
    overrides: tuple[str, ...] = ()


class CheckpointRecord(Record):
    """The metadata of a checkpoint, averaged or not.

    Attributes:
        run: A hash of recipe, seed, schema and training files: averaging mixes one run only.
        step: Optimisation steps taken; the last one averaged, in an averaged checkpoint.
        examples: Videos seen until then.
        training_files: The patterns of the records it was trained on, absolute.
        validation_files: So for the records its run's checkpoints are measured on, if any.
        ema_decay: The decay of the exponential moving average over steps that its weights are; None
            where they are those of one step, or a mean of such.
        averaged_from: The checkpoints that were averaged, if any.
        batch_norm: How an averaged checkpoint came by its batch-norm statistics.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    kit_version: str
    name: str
    run: str
    recipe: RecipeRecord
    data_schema: Schema
    step: int
    examples: int
    seed: int
    training_files: tuple[str, ...]
    validation_files: tuple[str, ...] = ()
    ema_decay: float | None = None
    averaged_from: tuple[FileRecord, ...] = ()
    batch_norm: Literal["trained", "recalibrate", "average", "last"] = "trained"


class ModelRecord(Record):
    """The model that made some predictions.

    Attributes:
        file: Where it lies, relative to the predictions file, and its hash then.
        kind: What kind of file it is.
        num_values: Numbers that ``fuse`` will store for it: parameters and statistics.
        repeats: Draws whose probabilities were averaged; 1 where nothing is drawn.
    """

    file: FileRecord
    kind: Literal["checkpoint", "fused", "onnx"]
    num_values: int
    repeats: int


class PredictionsRecord(Record):
    """The metadata of a predictions file.

    Attributes:
        name: The name that selection knows these predictions by.
        vocabulary_sha256: The hash of the class names in order.
        dataset_sha256: The hash of video ids and labels in order.
        top_k: How many classes of each video the file keeps; None where it keeps all.
    """

    kind: Literal["predictions"] = "predictions"
    kit_version: str
    name: str
    model: ModelRecord | None
    label_names: tuple[str, ...]
    vocabulary_sha256: str
    dataset_sha256: str
    top_k: int | None = None


class MemberRecord(Record):
    """One member of a fused graph."""

    name: str
    coefficient: float
    recipe: RecipeRecord
    checkpoint: FileRecord
    num_values: int


class ValidationRecord(Record):
    """The GAP that a selection measured for the members of a fused file.

    Attributes:
        gap: GAP@k of their weighted mean.
        k: The k of it.
        videos: Videos that it was measured on.
        dataset_sha256: The hash of their ids and labels in order.
        repeats: Draws whose probabilities were averaged, the most of any member.
    """

    gap: float
    k: int
    videos: int
    dataset_sha256: str
    repeats: int


class FusedRecord(Record):
    """The metadata of a fused file.

    Attributes:
        dtype: The type its weights are stored in.
        members: In selection's order; coefficients sum to 1.
        data_schema: What its inputs and its classes are.
        selection: The selection it was fused from.
        validation: What selection measured.
        top_k: How many classes are listed for a video.
    """

    kind: Literal["fused"] = "fused"
    kit_version: str
    dtype: Dtype
    members: tuple[MemberRecord, ...]
    data_schema: Schema
    selection: FileRecord | None
    validation: ValidationRecord | None
    top_k: int


class SelectedRecord(Record):
    """One member of a selection.

    Attributes:
        name: The name of its predictions.
        coefficient: What its probabilities are multiplied by; the members' sum to 1.
        bytes: What it will take in the fused file; 0 where its size was not told.
        gap: The GAP of the member alone.
        gap_without: The GAP of the other members; 0 where there is no other.
        predictions: The predictions it was selected by.
        model: The model that made them, its path relative to the selection; None for a CSV file.
    """

    name: str
    coefficient: float
    bytes: int
    gap: float
    gap_without: float
    predictions: FileRecord
    model: ModelRecord | None


class StepRecord(Record):
    """One step of a selection: the member added, and GAP and bytes of all members then."""

    added: str
    gap: float
    bytes: int


class CandidateRecord(Record):
    """What selection could choose from, best first.

    Attributes:
        gap: The GAP of the candidate alone.
        skipped: Why it is no member; None for a member.
    """

    name: str
    gap: float
    bytes: int
    skipped: str | None


class SelectionRecord(Record):
    """A selection: what ``selection.json`` holds.

    Attributes:
        k: The k of every GAP in it.
        dtype: The type that members' bytes were counted in.
        max_size: The most bytes that the members together may take.
        mixing: How the members' probabilities are mixed: ``uniform`` is their mean, ``gap`` counts
            each by its own GAP.
        rule: How members were chosen, in words.
        dataset_sha256: The hash of video ids and labels in order.
        vocabulary_sha256: The hash of the class names; None where every candidate is a CSV file.
        videos: Videos that GAP was measured on; so for ``positives``.
        gap: The GAP of the members' weighted mean.
        bytes: What all members take together.
        members: In the order in which they were added.
        path: A step for each member.
    """

    kind: Literal["selection"] = "selection"
    kit_version: str
    k: int
    dtype: Dtype
    max_size: int
    mixing: Mixing = "uniform"
    rule: str
    dataset_sha256: str
    vocabulary_sha256: str | None
    videos: int
    positives: int
    gap: float
    bytes: int
    members: Annotated[tuple[SelectedRecord, ...], Field(min_length=1)]
    path: tuple[StepRecord, ...]
    candidates: tuple[CandidateRecord, ...]
