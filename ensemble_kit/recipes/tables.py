"""The tables of a recipe: every part's arguments, as recipes write them."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from ensemble_kit.recipes.own_parts import OrOwn

# Far beyond every system, and so small that a mistyped number is refused and fills no memory.
Count: TypeAlias = Annotated[int, Field(ge=1, le=10**12)]  # of steps, of examples
Size: TypeAlias = Annotated[int, Field(ge=1, le=10**6)]  # of anything that takes memory
Layers: TypeAlias = Annotated[int, Field(ge=1, le=100)]
Factor: TypeAlias = Annotated[float, Field(gt=0)]
PerModality: TypeAlias = Size | Annotated[dict[str, Size], Field(min_length=1)]
ModalityFusion: TypeAlias = Literal["late", "early"]


class Table(BaseModel):
    """One table of a recipe: strict types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PartTable(Table):
    """The keys of another package's part, ``package:part``: those of a class that derives from it.

    The part's constructor gets them by keyword; see ``layers/protocols.py``.
    """

    name: str


class PoolingTable(PartTable):
    """The keys of another package's pooling."""

    modality_fusion: ModalityFusion


class HeadTable(PartTable):
    """The keys of another package's head."""

    probability_gating: bool
    remove_diagonal: bool | None = None


class ModelTable(PartTable):
    """The keys of another package's whole model."""


class SourceTable(Table):
    """Where every number of the recipe was read."""

    paper: str
    code: str | None = None


class InputTable(Table):
    """What happens to the joint frame before it is pooled."""

    l2_normalise: bool = True
    batch_norm: bool


class RandomSamplingTable(Table):
    """Frames drawn with replacement."""

    name: Literal["random"]
    num_frames: Size


class SequenceSamplingTable(Table):
    """Consecutive frames from a random start."""

    name: Literal["random_sequence"]
    num_frames: Size


class UniformSamplingTable(Table):
    """Frames at equal distances."""

    name: Literal["uniform"]
    num_frames: Size


class AllFramesTable(Table):
    """Every frame once, in order."""

    name: Literal["all"]


class AveragePoolingTable(Table):
    """The mean of the frames."""

    name: Literal["average"]
    modality_fusion: ModalityFusion


class DBoFTable(Table):
    """Units of a projection, pooled over the frames."""

    name: Literal["dbof"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality
    activation: Literal["relu", "relu6", "sigmoid"]
    over_frames: Literal["max", "average"]


class SoftBoFTable(Table):
    """Counts of softly assigned frames."""

    name: Literal["soft_bof"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality


class GatedBoFTable(Table):
    """Counts of softly assigned frames, those of the first modality gated by its largest."""

    name: Literal["gated_bof"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality
    gate_rank: Size


class NonLocalTable(Table):
    """The non-local block on residuals.

    ``num_clusters`` and ``half_features`` for the inner width are those of the stream, and
    ``rsqrt_features`` for the temperature is ``1 / sqrt(D)``.
    """

    inner_size: Literal["num_clusters", "half_features"] | Size
    temperature: Literal["rsqrt_features"] | Annotated[float, Field(gt=0)]


class NetVLADTable(Table):
    """Residuals to cluster centres."""

    name: Literal["netvlad"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality
    non_local: NonLocalTable | None = None


class NetRVLADTable(Table):
    """Sums of softly assigned frames, with no centres."""

    name: Literal["netrvlad"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality
    non_local: NonLocalTable | None = None


class NetFVTable(Table):
    """First- and second-order statistics of each cluster."""

    name: Literal["net_fv"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality


class AttentionNetVLADTable(Table):
    """NetVLAD with encoders around it, or in the place of its assignment."""

    name: Literal["attention_netvlad"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality
    num_heads: PerModality
    encode_frames: bool
    encode_clusters: bool
    similarity: Literal["softmax", "attention"]


class SecondOrderTable(Table):
    """Normalised and whitened residuals of first and second order."""

    name: Literal["second_order"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality
    reduced_size: PerModality


class NeXtVLADTable(Table):
    """NetVLAD over groups of an expanded frame."""

    name: Literal["nextvlad"]
    modality_fusion: ModalityFusion
    num_clusters: PerModality
    expansion: Size
    num_groups: PerModality


class RecurrentTable(Table):
    """What every recurrent stack takes."""

    name: str  # first here, so that messages list it first
    modality_fusion: ModalityFusion
    hidden_size: PerModality
    num_layers: Layers
    state: Literal["all", "last"]


class GRUTable(RecurrentTable):
    """The final state of a stacked GRU."""

    name: Literal["gru"]


class LSTMTable(RecurrentTable):
    """The final state of a stacked LSTM."""

    name: Literal["lstm"]


class BiGRUTable(RecurrentTable):
    """The final states of a stacked GRU that reads in both directions."""

    name: Literal["bigru"]


class BiLSTMTable(RecurrentTable):
    """The final states of a stacked LSTM that reads in both directions."""

    name: Literal["bilstm"]


class AttentionBiGRUTable(Table):
    """Attention over the outputs of a bidirectional GRU."""

    name: Literal["attention_bigru"]
    modality_fusion: ModalityFusion
    embedding_size: PerModality
    hidden_size: PerModality
    num_layers: Layers
    attention_size: Size


class ConcatTable(Table):
    """The pooled modalities, side by side."""

    name: Literal["concat"]


class FCConcatTable(Table):
    """Each modality projected, then side by side."""

    name: Literal["fc_concat"]
    size: Size


class MFBTable(Table):
    """Factorised bilinear pooling of two modalities."""

    name: Literal["mfb"]
    size: Size
    factors: Size
    dropout: Annotated[float, Field(ge=0, lt=1)]


class SharedSpaceTable(Table):
    """All modalities mapped into one space."""

    name: Literal["shared"]
    size: Size


class ProjectionTable(Table):
    """Two modalities mapped and drawn together by a penalty."""

    name: Literal["projection"]
    size: Size
    penalty: Annotated[float, Field(ge=0)]


class SingleTable(Table):
    """One modality alone."""

    name: Literal["single"]
    modality: str


ShippedGating: TypeAlias = Literal["context_gating", "glu", "se", "none"]
AnyGating: TypeAlias = Annotated[ShippedGating | PartTable, OrOwn(ShippedGating, PartTable)]


class HiddenTable(Table):
    """The projection after pooling, and its gating.

    With ``batch_norm`` a batch norm takes the place of the bias.
    """

    size: Size
    gating: AnyGating
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    batch_norm: bool | None = None
    activation: Literal["relu6"] | None = None
    remove_diagonal: bool | None = None

    @property
    def gating_name(self) -> str:
        """The name of the gating, whether it has a table or not."""
        return self.gating.name if isinstance(self.gating, PartTable) else self.gating


class LogisticTable(Table):
    """One sigmoid a class."""

    name: Literal["logistic"]
    probability_gating: bool
    remove_diagonal: bool | None = None


class MixtureOfExpertsTable(Table):
    """A gated mixture of sigmoids a class."""

    name: Literal["mixture_of_experts"]
    num_experts: Size
    gate_rank: Size | None = None
    probability_gating: bool
    remove_diagonal: bool | None = None


class LearningRateFactorsTable(Table):
    """What the learning rate of a part's weights is multiplied by; 1 where it is left out.

    ``hidden`` is the projection and its gating, ``head`` the head and its probability gating.
    """

    input: Factor | None = None
    pooling: Factor | None = None
    fusion: Factor | None = None
    hidden: Factor | None = None
    head: Factor | None = None


class TrainingTable(Table):
    """The schedule: what is true of the recipe on every machine.

    Left out, ``schedule`` is the papers' staircase and ``clip`` each variable by itself, and
    ``clip_norm`` and ``batch_norm_momentum`` are those of all five systems. A cosine falls to 0
    with ``max_steps`` and has no stairs. No system's code has the last four: ``balance`` is the
    power of a record's rarity by which it comes more often (``data/balance``), ``mixup`` and
    ``label_smoothing`` are ``training/mixing``'s.
    """

    batch_size: Size
    learning_rate: Annotated[float, Field(gt=0)]
    learning_rate_decay: Annotated[float, Field(gt=0, le=1)]
    examples_per_decay: Count
    max_steps: Count
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    l2_penalty: Annotated[float, Field(ge=0)]
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)] = 0.001
    checkpoint_every: Count
    average_last: Size
    schedule: Literal["staircase", "cosine"] | None = None
    warmup_examples: Count | None = None
    clip: Literal["each", "global"] | None = None
    balance: Annotated[float, Field(gt=0, le=1)] | None = None
    mixup: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(gt=0, lt=1)] | None = None
    learning_rate_factors: LearningRateFactorsTable | None = None


class ReportedTable(Table):
    """What the source claims; never a measurement of the kit.

    ``averaged_gap_at_20`` is the GAP of the average of a run's last checkpoints.
    """

    gap_at_20: Annotated[float, Field(ge=0, le=1)] | None = None
    averaged_gap_at_20: Annotated[float, Field(ge=0, le=1)] | None = None
    split: str | None = None
    checkpoint_mib: Annotated[float, Field(gt=0)] | None = None


ShippedSampling: TypeAlias = Annotated[
    RandomSamplingTable | SequenceSamplingTable | UniformSamplingTable | AllFramesTable,
    Field(discriminator="name"),
]
ShippedPooling: TypeAlias = Annotated[
    AveragePoolingTable
    | DBoFTable
    | SoftBoFTable
    | GatedBoFTable
    | NetVLADTable
    | NetRVLADTable
    | NetFVTable
    | AttentionNetVLADTable
    | SecondOrderTable
    | NeXtVLADTable
    | GRUTable
    | LSTMTable
    | BiGRUTable
    | BiLSTMTable
    | AttentionBiGRUTable,
    Field(discriminator="name"),
]
ShippedFusion: TypeAlias = Annotated[
    ConcatTable | FCConcatTable | MFBTable | SharedSpaceTable | ProjectionTable | SingleTable,
    Field(discriminator="name"),
]
ShippedHead: TypeAlias = Annotated[
    LogisticTable | MixtureOfExpertsTable, Field(discriminator="name")
]
AnySamplingTable: TypeAlias = Annotated[
    ShippedSampling | PartTable, OrOwn(ShippedSampling, PartTable)
]
AnyPoolingTable: TypeAlias = Annotated[
    ShippedPooling | PoolingTable, OrOwn(ShippedPooling, PoolingTable)
]
AnyFusionTable: TypeAlias = Annotated[ShippedFusion | PartTable, OrOwn(ShippedFusion, PartTable)]
AnyHeadTable: TypeAlias = Annotated[ShippedHead | HeadTable, OrOwn(ShippedHead, HeadTable)]
AnyModelTable: TypeAlias = Annotated[ModelTable, OrOwn(ModelTable, ModelTable)]
