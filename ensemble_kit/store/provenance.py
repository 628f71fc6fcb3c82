"""What each file says of itself: the strict records in the metadata of every file of the kit.

Imports ``errors`` and ``data.schema``. Nothing here reads or writes a file.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ensemble_kit.data.schema import Schema

Activation = Literal["none", "sigmoid", "softmax"]
Dtype = Literal["fp32", "fp16", "bf16", "int8"]
FrameForm = Literal["raw", "dequantised", "normalised"]
ModelKind = Literal["checkpoint", "foreign", "fused", "onnx"]
Sampling = Literal["fixed", "random", "input"]
InputType = Literal["uint8", "float32"]
# int8: the small rest, which is bf16, is not counted
BYTES_PER_VALUE: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


class Record(BaseModel):
    """A record read strictly: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileMetadata(Record):
    """A file and what it held: ``path`` is relative to the folder of the file that names it."""

    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RecipeMetadata(Record):
    """A recipe as it was run: its name, its text and the ``--set`` values over it."""

    name: str
    text: str
    overrides: tuple[str, ...] = ()


class CheckpointMetadata(Record):
    """The metadata of a checkpoint, averaged or not.

    Attributes:
        run: A hash of recipe, seed, records and options: averaging mixes one run only.
        step: Optimisation steps taken; the last one averaged, in an averaged checkpoint.
        examples: Videos seen until then.
        training_files: The patterns of the records it was trained on, absolute.
        validation_files: So for the records its run's checkpoints are measured on, if any.
        ema_decay: The decay of the exponential moving average over steps that its weights are; None
            where they are those of one step, or a mean of such.
        averaged_from: The checkpoints that were averaged, if any.
        batch_norm: How an averaged checkpoint came by its batch-norm statistics.
        validation_gap: The GAP@20 that an averaged checkpoint was compared by; None where it was
            compared with nothing.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    kit_version: str
    name: str
    run: str
    recipe: RecipeMetadata
    data_schema: Schema
    step: int
    examples: int
    seed: int
    training_files: tuple[str, ...]
    validation_files: tuple[str, ...] = ()
    ema_decay: float | None = None
    averaged_from: tuple[FileMetadata, ...] = ()
    batch_norm: Literal["trained", "recalibrate", "average", "last"] = "trained"
    validation_gap: float | None = None


class MeasuredMetadata(Record):
    """A step that a checkpoint was written at; its GAP@20 is None without validation records."""

    step: int
    gap: float | None


class TrainingStateMetadata(Record):
    """The metadata of a run's state, from which training goes on.

    Attributes:
        settings: What makes the run what it is, by name: hashes and values.
        is_finished: Whether all steps are taken; the file then holds no tensors.
        step: Optimisation steps taken.
        batches: Batches read, those that nothing was good in too.
        examples: Videos seen.
        seconds: How long training has taken so far.
        measured: The checkpoints written at their regular steps, those removed since too.
    """

    kind: Literal["training state"] = "training state"
    kit_version: str
    name: str
    settings: dict[str, str]
    is_finished: bool
    step: int
    batches: int
    examples: int
    seconds: float
    measured: tuple[MeasuredMetadata, ...]


class InputMetadata(Record):
    """What an input of an imported graph is given.

    Attributes:
        name: Of the graph's input.
        holds: The frames of some modalities, how many of them are a video's own, or which.
        modalities: Those whose frames it is given, side by side in this order.
    """

    name: str
    holds: Literal["frames", "num_frames", "is_frame"]
    modalities: tuple[str, ...] = ()


class MappingMetadata(Record):
    """How a graph that another framework made is given frames, and what its output is.

    Attributes:
        frames: ``raw`` as records store them, ``dequantised`` to floating point, or ``normalised``:
            dequantised, and each joint frame of all modalities of length 1. Padding is 0.
        inputs: Every input of the graph that is no weight.
        activation: What makes probabilities of the graph's output.
    """

    frames: FrameForm
    inputs: tuple[InputMetadata, ...]
    activation: Activation


class ForeignMetadata(Record):
    """The metadata of a model that another framework made.

    Attributes:
        mapping: What its graph is given.
        onnx: The ONNX file that it was imported from.
    """

    kind: Literal["foreign"] = "foreign"
    kit_version: str
    name: str
    mapping: MappingMetadata
    data_schema: Schema
    onnx: FileMetadata


class ModelMetadata(Record):
    """The model that made some predictions.

    Attributes:
        file: Where it lies, relative to the predictions file, and its hash then.
        kind: What kind of file it is.
        num_values: Numbers that ``fuse`` will store for it: parameters and statistics.
        repeats: Draws whose probabilities were averaged; 1 where nothing is drawn.
    """

    file: FileMetadata
    kind: ModelKind
    num_values: int
    repeats: int


class PredictionsMetadata(Record):
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
    model: ModelMetadata | None
    label_names: tuple[str, ...]
    vocabulary_sha256: str
    dataset_sha256: str
    top_k: int | None = None


class MemberMetadata(Record):
    """One member of a fused graph.

    Attributes:
        recipe: What it was trained by; None for one that another framework made.
        mapping: What the graph of such a one is given; None for all others.
        checkpoint: The file that it was fused from, imported or trained.
    """

    name: str
    coefficient: float
    recipe: RecipeMetadata | None
    mapping: MappingMetadata | None = None
    checkpoint: FileMetadata
    num_values: int


class ValidationMetadata(Record):
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


class FusedMetadata(Record):
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
    members: tuple[MemberMetadata, ...]
    data_schema: Schema
    selection: FileMetadata | None
    validation: ValidationMetadata | None
    top_k: int


class OnnxMetadata(Record):
    """The metadata of an ONNX file, one property a field.

    Attributes:
        dtype: The type its weights are stored in.
        members: In selection's order; coefficients sum to 1.
        data_schema: What its inputs and its classes are.
        label_names: The classes' names, for servers that read no schema.
        input_types: The type of each modality's input.
        sampling: Where its draws come from: a table in the file, fresh numbers, or an input.
        repeats: Draws whose probabilities are averaged; with ``input``, those of its proofs.
        repeats_are_free: Whether an input of draws may have any number of them.
        draws: Uniform numbers in one draw of each member that samples at random.
        top_k: How many classes are listed for a video.
        weights_file: The file beside that holds the weights; None where the file does itself.
        fused_sha256: The hash of the fused file that it was exported from.
        validation: What selection measured.
    """

    kit_version: str
    dtype: Dtype
    members: tuple[MemberMetadata, ...]
    data_schema: Schema
    label_names: tuple[str, ...]
    input_types: dict[str, InputType]
    sampling: Sampling
    repeats: int
    repeats_are_free: bool
    draws: dict[str, int]
    top_k: int
    weights_file: FileMetadata | None
    fused_sha256: str
    validation: ValidationMetadata | None
