"""What each file of the kit says of itself, as strict classes.

All paths in metadata are relative to the folder of the file that holds it, and are written with
``/`` on every system, so that a workspace can be moved, and read on another system.
"""

import hashlib
from collections.abc import Iterable, Mapping
from os.path import relpath
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ensemble_kit.choices import (
    BLOCK_DTYPES,
    BLOCK_OPSET,
    LAYOUT,
    MAX_CLASSES,
    Activation,
    BatchNormRule,
    DrawSource,
    Dtype,
    FrameForm,
    InputType,
    Layout,
    Metric,
)
from ensemble_kit.data.folds import FOLD
from ensemble_kit.data.schema import Names, Schema
from ensemble_kit.files import sha256_of
from ensemble_kit.store.dtypes import finest_first
from ensemble_kit.store.workspace import RUN_NAME
from ensemble_kit.wording import metric_name

ModelKind = Literal["checkpoint", "foreign", "fused", "onnx", "folds"]
FUSIBLE: tuple[ModelKind, ...] = ("checkpoint", "foreign")  # what can be a member
# Where batch-norm statistics come from: training, or the rule of an average.
BatchNormSource: TypeAlias = Literal["trained", BatchNormRule]
# What numbers may be: a file that was damaged, or made to harm, may say of 10^80 repeats.
Count: TypeAlias = Annotated[int, Field(ge=0, le=2**53)]
Repeats: TypeAlias = Annotated[int, Field(ge=1, le=100_000)]
TopK: TypeAlias = Annotated[int, Field(ge=1, le=MAX_CLASSES)]
Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NO_HASH = "0" * 64  # until a hash is known; of the same length
RunName: TypeAlias = Annotated[str, Field(pattern=f"^{RUN_NAME}$")]  # folders and nodes have it


class Metadata(BaseModel):
    """Metadata read strictly: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileMetadata(Metadata):
    """A file and the SHA-256 of its bytes."""

    path: str
    sha256: Sha256

    @classmethod
    def of(cls, path: Path, folder: Path, *, sha256: str | None = None) -> "FileMetadata":
        """Describe a file for the metadata of one in ``folder``.

        Args:
            path: The file.
            folder: The folder of the file that will name it.
            sha256: The file's hash where it is known already; None reads the file.
        """
        where = Path(relpath(path, folder)).as_posix()
        return cls(path=where, sha256=sha256 or sha256_of(path))


class RecipeMetadata(Metadata):
    """A recipe as it was run.

    Attributes:
        name: Its name.
        text: Its text.
        overrides: The ``--set`` values over it.
        packages: The versions of the packages whose parts it names, by package.
    """

    name: str
    text: str
    overrides: tuple[str, ...] = ()
    packages: dict[str, str] = {}


class CheckpointMetadata(Metadata):
    """The metadata of a checkpoint, averaged or not.

    Attributes:
        run: A hash of recipe, seed, records and options: averaging mixes one run only.
        step: Optimisation steps taken; the last one averaged, in an averaged checkpoint.
        examples: Training videos seen so far.
        training_files: The patterns of the records it was trained on, absolute.
        validation_files: The patterns of the records that its run's checkpoints are measured on,
            if any.
        fold: The fold of the training records that was held out for that, such as ``2/5``, if one
            was; see ``data.folds``.
        ema_decay: The decay of the exponential moving average over steps that its weights are; None
            where they are those of one step, or a mean of such.
        averaged_from: The checkpoints that were averaged, if any.
        batch_norm: Where the batch-norm statistics of an averaged checkpoint are from.
        validation_gap: The GAP@20 that an averaged checkpoint was compared by; None where it was
            compared with nothing.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    kit_version: str
    name: RunName
    run: str
    recipe: RecipeMetadata
    data_schema: Schema
    step: Count
    examples: Count
    seed: Count
    training_files: tuple[str, ...]
    validation_files: tuple[str, ...] = ()
    fold: Annotated[str, Field(pattern=f"^{FOLD}$")] | None = None
    ema_decay: float | None = None
    averaged_from: tuple[FileMetadata, ...] = ()
    batch_norm: BatchNormSource = "trained"
    validation_gap: float | None = None


class MeasuredMetadata(Metadata):
    """A step that a checkpoint was written at; its GAP@20 is None without validation records."""

    step: Count
    gap: float | None


class TrainingStateMetadata(Metadata):
    """The metadata of a run's state, from which training resumes.

    Attributes:
        settings: The settings that identify the run, by name: hashes and values.
        modified_ns: When each file of training records, then each of validation records, was last
            modified: one that was touched since is compared with its checksums again.
        is_finished: Whether all steps are taken; the file then holds no tensors.
        step: Optimisation steps taken.
        batches: Batches read, including those without a good record.
        examples: Videos seen.
        seconds: How long training has taken so far.
        measured: The checkpoints written at their regular steps, including those removed since.
    """

    kind: Literal["training state"] = "training state"
    kit_version: str
    name: RunName
    settings: dict[str, str]
    modified_ns: tuple[int, ...] = ()
    is_finished: bool
    step: Count
    batches: Count
    examples: Count
    seconds: float
    measured: tuple[MeasuredMetadata, ...]


class InputMetadata(Metadata):
    """What an input of a foreign graph is given.

    Attributes:
        name: The name of the input.
        holds: ``frames`` of some modalities, the number of a video's frames, or the mask that tells
            frames from padding.
        modalities: The modalities whose frames it is given, side by side in this order.
        layout: Whether frames are ``(videos, frames, features)`` or ``(videos, features, frames)``.
    """

    name: str
    holds: Literal["frames", "num_frames", "is_frame"]
    modalities: tuple[str, ...] = ()
    layout: Layout = LAYOUT


class MappingMetadata(Metadata):
    """How a graph that another framework made is given frames, and what its output is.

    Attributes:
        frames: ``raw`` as records store them, ``dequantised`` to floating point, or ``normalised``:
            dequantised, and each joint frame of all modalities of length 1. Padding is 0.
        inputs: Every input of the graph that is not a weight.
        activation: The function that turns the graph's output into probabilities.
        max_frames: The frames of the longest video that it was proved on.
    """

    frames: FrameForm
    inputs: tuple[InputMetadata, ...]
    activation: Activation
    max_frames: Count


class ForeignMetadata(Metadata):
    """The metadata of a model that another framework made.

    Attributes:
        mapping: What its graph is given.
        onnx: The ONNX file that it was imported from.
    """

    kind: Literal["foreign"] = "foreign"
    kit_version: str
    name: RunName
    mapping: MappingMetadata
    data_schema: Schema
    onnx: FileMetadata


class FoldsMetadata(Metadata):
    """The models that made out-of-fold predictions, each those of the fold it was not trained on.

    Attributes:
        checkpoints: Their files, by fold.
        recipe: The recipe of all of them.
        schema_sha256: The hash of the schema of all of them, as JSON.
    """

    checkpoints: Annotated[tuple[FileMetadata, ...], Field(min_length=2)]
    recipe: RecipeMetadata
    schema_sha256: Sha256


class ModelMetadata(Metadata):
    """The model that made some predictions.

    Attributes:
        file: The model's file, with its hash when it made the predictions; of ``folds`` the first.
        kind: What kind of file it is; ``folds`` are several checkpoints, and no file.
        num_values: Numbers that ``fuse`` will store for it in its precision: parameters and
            statistics.
        bytes_by_dtype: What a fused file takes for it in each precision, to the byte, beside
            ``shared_bytes``; None of a model that cannot be fused.
        shared_bytes: What a fused file takes once for all of its members.
        dtype: The precision that its weights were rounded to before it ran; None where it ran as
            its file stores it.
        repeats: Draws whose probabilities were averaged; 1 where nothing is drawn.
        folds: The checkpoints of ``folds``; None of every other kind.
    """

    file: FileMetadata
    kind: ModelKind
    num_values: Count
    bytes_by_dtype: dict[Dtype, Count] | None = None
    shared_bytes: Count = 0
    dtype: Dtype | None = None
    repeats: Repeats
    folds: FoldsMetadata | None = None

    @property
    def files(self) -> tuple[FileMetadata, ...]:
        """All files that the predictions were made by."""
        return (self.file,) if self.folds is None else self.folds.checkpoints

    def at(self, home: Path, folder: Path) -> "ModelMetadata":
        """Return the metadata with paths relative to ``folder`` in place of ``home``."""

        def moved(file: FileMetadata) -> FileMetadata:
            return FileMetadata.of(home / file.path, folder, sha256=file.sha256)

        folds = self.folds
        if folds is not None:
            checkpoints = tuple(map(moved, folds.checkpoints))
            folds = folds.model_copy(update={"checkpoints": checkpoints})
        return self.model_copy(update={"file": moved(self.file), "folds": folds})

    def measures(self, dtype: Dtype) -> bool:
        """Return whether its predictions are those of a member that is stored in a precision.

        Weights as they were trained also stand for fp16 and bf16, which round every number by less
        than a hundredth.
        """
        return dtype == self.dtype or (self.dtype in (None, "fp32") and dtype not in BLOCK_DTYPES)


def schema_sha256(schema: Schema) -> str:
    """Return the hash of a schema, as JSON."""
    text: str = schema.model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()


class ShardMetadata(Metadata):
    """The file of records that a predictions file of a folder was made from.

    Attributes:
        name: Its file name.
        url: Where it lies, if it was fetched from a URL.
        content: What tells its content from any other: its size and a hash, or its server's
            version of it.
        schema_sha256: The hash of the schema that it was read by.
        skips_bad_records: Whether bad records were left out.
    """

    name: str
    url: str | None = None
    content: str
    schema_sha256: Sha256
    skips_bad_records: bool


class PredictionsMetadata(Metadata):
    """The metadata of a predictions file.

    Attributes:
        name: The name that selection knows these predictions by.
        vocabulary_sha256: The hash of the class names in order.
        dataset_sha256: The hash of video ids and labels in order.
        top_k: How many classes of each video the file keeps; None where it keeps all.
        shard: The one file of records that it was made from, in a folder of such files.
    """

    kind: Literal["predictions"] = "predictions"
    kit_version: str
    name: str
    model: ModelMetadata | None
    label_names: Names
    vocabulary_sha256: Sha256
    dataset_sha256: Sha256
    top_k: TopK | None = None
    shard: ShardMetadata | None = None


class MemberMetadata(Metadata):
    """One member of a fused graph.

    Attributes:
        dtype: The precision that it is stored in.
        recipe: The recipe it was trained with; None for a foreign model.
        mapping: The mapping of a foreign model; None for all others.
        checkpoint: The file that it was fused from, foreign or trained.
    """

    name: RunName
    coefficient: float
    dtype: Dtype
    recipe: RecipeMetadata | None
    mapping: MappingMetadata | None = None
    checkpoint: FileMetadata
    num_values: Count

    @model_validator(mode="after")
    def _agrees(self) -> "MemberMetadata":
        if (self.recipe is None) == (self.mapping is None):
            raise ValueError(f"member {self.name} needs either a recipe or a mapping")
        return self


def dtypes_of(members: Iterable[MemberMetadata]) -> tuple[Dtype, ...]:
    """Return the precisions that some members are stored in, each once, finest first."""
    return finest_first(member.dtype for member in members)


def has_blocks(members: Iterable[MemberMetadata]) -> bool:
    """Return whether some member has matrices in blocks."""
    return any(member.dtype in BLOCK_DTYPES for member in members)


class ValidationMetadata(Metadata):
    """What a selection measured for the members of a fused file.

    Attributes:
        metric: What selection chose them by.
        score: The metric of their weighted mean.
        k: The k of GAP@k and mAP@k.
        videos: The number of videos that it was measured on.
        dataset_sha256: The hash of their ids and labels in order.
        repeats: Draws whose probabilities were averaged, the most of any member.
        is_refit: Whether some member was trained again on all of these videos since, so that its
            score on them says nothing; the one here is that of its out-of-fold predictions.
    """

    metric: Metric
    score: float
    k: TopK
    videos: Count
    dataset_sha256: Sha256
    repeats: Repeats
    is_refit: bool = False

    @property
    def metric_name(self) -> str:
        """What people call the metric, such as ``GAP@20``."""
        return metric_name(self.metric, self.k)


class FusedMetadata(Metadata):
    """The metadata of a fused file.

    Attributes:
        members: The members in selection's order; their coefficients sum to 1.
        data_schema: Its modalities and its classes.
        selection: The selection it was fused from.
        validation: What selection measured.
        top_k: How many classes are listed for a video.
        content_sha256: The hash of the whole file with ``NO_HASH`` in place of this hash.
    """

    kind: Literal["fused"] = "fused"
    kit_version: str
    members: Annotated[tuple[MemberMetadata, ...], Field(min_length=1)]
    data_schema: Schema
    selection: FileMetadata | None
    validation: ValidationMetadata | None
    top_k: TopK
    content_sha256: Sha256

    @model_validator(mode="after")
    def _agrees(self) -> "FusedMetadata":
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError(f"two members share a name: {', '.join(names)}")
        return self


class ShippedGapMetadata(Metadata):
    """What computing from packed numbers did to GAP.

    Attributes:
        exact: GAP@k with the same weights in float32.
        shipped: GAP@k as the file is run.
        k: The k of both.
        videos: Videos that both were measured on.
    """

    exact: float
    shipped: float
    k: int
    videos: int


class SharesMetadata(Metadata):
    """How many of a file's stored numbers are used in which way when it is run.

    Attributes:
        as_stored: Products are computed from them as they are.
        converted_once: Converted to float32 while the file is opened.
        converted_in_every_run: Converted to float32 again and again.
    """

    as_stored: int
    converted_once: int
    converted_in_every_run: int

    def __str__(self) -> str:
        """Return all three in per cent."""
        counts = (self.as_stored, self.converted_once, self.converted_in_every_run)
        total = max(1, sum(counts))
        stored, once, again = (f"{100 * count / total:.1f} %" for count in counts)
        return f"{stored} as stored, {once} converted at opening, {again} in every run"


class ProofMetadata(Metadata):
    """What was measured of an ONNX file before it was kept.

    Attributes:
        exact_difference: The largest difference of a probability from PyTorch's with the same
            rounded weights, products summed in float32.
        shipped_difference: The same as the file is run; None where that is no different.
        shares: How its numbers are used.
        gap: GAP on validation records; None where none were given.
    """

    exact_difference: float
    shipped_difference: float | None
    shares: SharesMetadata
    gap: ShippedGapMetadata | None


class OnnxMetadata(Metadata):
    """The metadata of an ONNX file, which has one property for each field.

    Attributes:
        members: The members in selection's order; their coefficients sum to 1.
        data_schema: Its modalities and its classes.
        label_names: The classes' names, for servers that read no schema.
        input_types: The type of each modality's input.
        draw_source: Where its draws come from: a table in the file, fresh numbers, or an input.
        repeats: Draws whose probabilities are averaged; with ``input``, those of its proofs.
        repeats_are_free: Whether an input of draws may have any number of them.
        draws: Uniform numbers in one draw of each member that samples at random.
        top_k: How many classes are listed for a video.
        opset: The version of ONNX's operators; products are packed from 21 on.
        weights_file: The file beside that holds the weights; None where the file does itself.
        fused_sha256: The hash of the fused file that it was exported from.
        validation: What selection measured.
        proof: What was measured before it was kept; None in a file that has not been proved yet.
    """

    kit_version: str
    members: tuple[MemberMetadata, ...]
    data_schema: Schema
    label_names: Names
    input_types: dict[str, InputType]
    draw_source: DrawSource
    repeats: Repeats
    repeats_are_free: bool
    draws: dict[str, int]
    top_k: TopK
    opset: int
    weights_file: FileMetadata | None
    fused_sha256: Sha256
    validation: ValidationMetadata | None
    proof: ProofMetadata | None = None

    @property
    def is_packed(self) -> bool:
        """Whether products are computed from matrices in blocks as they are stored."""
        return self.opset >= BLOCK_OPSET and has_blocks(self.members)

    def files(self, path: Path) -> list[Path]:
        """Return the files that are needed to run the one at ``path``: itself, then its weights."""
        beside = self.weights_file
        return [path] if beside is None else [path, path.with_name(beside.path)]


TensorMetadata: TypeAlias = (
    CheckpointMetadata
    | TrainingStateMetadata
    | ForeignMetadata
    | PredictionsMetadata
    | FusedMetadata
)
METADATA_TYPES: Mapping[str, type[TensorMetadata]] = MappingProxyType(
    {each.model_fields["kind"].default: each for each in get_args(TensorMetadata)}
)
