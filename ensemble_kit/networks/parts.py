"""Every part by the name that recipes give it, and how a recipe's table becomes a part.

The tables are literal: they can be searched for, they are checked against the protocols, and no
import changes them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ensemble_kit.errors import RecipeError
from ensemble_kit.layers import modality_fusion
from ensemble_kit.layers.attention import AttentionNetVLAD
from ensemble_kit.layers.average_pooling import AveragePooling
from ensemble_kit.layers.context_gating import ContextGating
from ensemble_kit.layers.dbof import DBoF
from ensemble_kit.layers.frame_sampling import (
    AllFrames,
    RandomSampling,
    SequenceSampling,
    UniformSampling,
)
from ensemble_kit.layers.gated_bof import GatedBoF
from ensemble_kit.layers.glu import GLU
from ensemble_kit.layers.heads import Logistic, MixtureOfExperts
from ensemble_kit.layers.net_fv import NetFV
from ensemble_kit.layers.netvlad import NetVLAD
from ensemble_kit.layers.nextvlad import NeXtVLAD
from ensemble_kit.layers.protocols import (
    Fusion,
    Gating,
    Head,
    PartError,
    Pooling,
    Sampling,
    SequencePooling,
    SetPooling,
)
from ensemble_kit.layers.recurrent import AttentionBiGRU, RecurrentPooling
from ensemble_kit.layers.se_gating import SEGating
from ensemble_kit.layers.second_order import SecondOrder
from ensemble_kit.layers.soft_bof import SoftBoF
from ensemble_kit.recipes.reading import for_modality
from ensemble_kit.recipes.tables import Pooling as PoolingTable
from ensemble_kit.recipes.tables import Table

Part = TypeVar("Part")
Parts: TypeAlias = Mapping[str, Callable[..., Part]]

SAMPLINGS: Parts[Sampling] = MappingProxyType(
    {
        "all": AllFrames,
        "random": RandomSampling,
        "random_sequence": SequenceSampling,
        "uniform": UniformSampling,
    }
)
SET_POOLINGS: Parts[SetPooling] = MappingProxyType(
    {
        "average": AveragePooling,
        "dbof": DBoF,
        "gated_bof": GatedBoF,
        "net_fv": NetFV,
        "netrvlad": partial(NetVLAD, has_centres=False),
        "netvlad": NetVLAD,
        "nextvlad": NeXtVLAD,
        "second_order": SecondOrder,
        "soft_bof": SoftBoF,
    }
)
SEQUENCE_POOLINGS: Parts[SequencePooling] = MappingProxyType(
    {
        "attention_bigru": AttentionBiGRU,
        "attention_netvlad": AttentionNetVLAD,
        "bigru": partial(RecurrentPooling, cell="gru", is_bidirectional=True),
        "bilstm": partial(RecurrentPooling, cell="lstm", is_bidirectional=True),
        "gru": partial(RecurrentPooling, cell="gru", is_bidirectional=False),
        "lstm": partial(RecurrentPooling, cell="lstm", is_bidirectional=False),
    }
)
FUSIONS: Parts[Fusion] = MappingProxyType(
    {
        "concat": modality_fusion.Concat,
        "fc_concat": modality_fusion.FCConcat,
        "mfb": modality_fusion.MFB,
        "projection": modality_fusion.Projection,
        "shared": modality_fusion.SharedSpace,
        "single": modality_fusion.Concat,
    }
)
GATINGS: Parts[Gating] = MappingProxyType(
    {"context_gating": ContextGating, "glu": GLU, "se": SEGating}
)
HEADS: Parts[Head] = MappingProxyType(
    {"logistic": Logistic, "mixture_of_experts": MixtureOfExperts}
)

# Keys of recipe tables that SubModel reads itself.
WIRING_KEYS = frozenset(
    {"name", "modality", "modality_fusion", "probability_gating", "remove_diagonal"}
)


class Stream(NamedTuple):
    """The frames that one pooling reads: a modality's, or those of all modalities joined.

    Attributes:
        name: The modality's name, which picks the values of per-modality arguments.
        num_features: D, the features of one frame.
        num_frames: N, the frames that sampling takes; None for all frames.
        is_first: Whether it is the schema's first.
    """

    name: str
    num_features: int
    num_frames: int | None
    is_first: bool


def arguments_of(table: Table) -> dict[str, Any]:
    """Return a part's own arguments: the table without what the wiring reads or what is left out.

    A table inside it becomes a dictionary.
    """
    return {
        key: arguments_of(value) if isinstance(value, Table) else value
        for key, value in dict(table).items()
        if key not in WIRING_KEYS and value is not None
    }


def takes(part: Callable[..., Part], argument: str) -> bool:
    """Return whether a part's constructor names an argument."""
    return argument in signature(part).parameters


def build_part(
    part: Callable[..., Part], arguments: Mapping[str, Any], offered: Mapping[str, Any]
) -> Part:
    """Build a part from its recipe's arguments and those offered facts that it names."""
    taken = {name: value for name, value in offered.items() if takes(part, name)}
    return part(**arguments, **taken)


def build_pooling(table: PoolingTable, stream: Stream, *, momentum: float) -> Pooling:
    """Build the pooling of one stream of frames.

    Args:
        table: The recipe's pooling.
        stream: What it reads.
        momentum: The share of a new batch in the running statistics of batch norms.

    Raises:
        RecipeError: A per-modality argument does not name the modality, or the part refuses an
            argument for these frames.
    """
    arguments: dict[str, Any] = {
        key: for_modality(value, stream.name, key=f"pooling.{key}")
        if isinstance(getattr(table, key), dict)
        else value
        for key, value in arguments_of(table).items()
    }
    offered = {
        "num_features": stream.num_features,
        "num_frames": stream.num_frames,
        "is_first": stream.is_first,
        "momentum": momentum,
    }
    try:
        if table.name in SET_POOLINGS:
            return build_part(SET_POOLINGS[table.name], arguments, offered)
        return build_part(SEQUENCE_POOLINGS[table.name], arguments, offered)
    except PartError as error:
        raise RecipeError(
            f"pooling.{error.key} is {arguments[error.key]!r} for {stream.name}, but "
            f"{error.reason}.",
            hint=f"Set pooling.{error.key} of {stream.name} to {error.advice}.",
        ) from error
