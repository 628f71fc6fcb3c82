"""Every part by the name that recipes give it, and how a recipe's table becomes a part.

The tables are literal: they can be searched for, they are checked against the protocols, and no
import changes them. A part of another package is looked up after them, and never over them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from torch import nn

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
    Model,
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
from ensemble_kit.recipes.own_parts import is_own, load_part
from ensemble_kit.recipes.reading import for_modality
from ensemble_kit.recipes.tables import AnyPoolingTable, Table

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

MODELS: Parts[Model] = MappingProxyType({})  # those of other packages only

# Each table with the place in a recipe that names its parts, and what they offer.
PLACES: tuple[tuple[Parts[Any], str, type], ...] = (
    (SAMPLINGS, "sampling", Sampling),
    (SET_POOLINGS, "pooling", SetPooling),
    (SEQUENCE_POOLINGS, "pooling", SequencePooling),
    (FUSIONS, "fusion", Fusion),
    (GATINGS, "hidden", Gating),
    (HEADS, "head", Head),
    (MODELS, "model", Model),
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


def find_part(parts: Parts[Part], name: str) -> Callable[..., Part]:
    """Return what builds a part: one of a table, or another package's.

    Raises:
        RecipeError: No installed package offers the part, or it cannot be imported.
    """
    return cast(Callable[..., Part], load_part(name)) if is_own(name) else parts[name]


def is_sequence_pooling(name: str) -> bool:
    """Return whether a pooling reads frames in order; one that describes single frames does not.

    Raises:
        RecipeError: As ``find_part``.
    """
    if is_own(name):
        return not hasattr(load_part(name), "describe")
    return name in SEQUENCE_POOLINGS


def takes(part: Callable[..., Part], argument: str) -> bool:
    """Return whether a part's constructor names an argument."""
    return argument in signature(part).parameters


def build_part(
    parts: Parts[Part],
    name: str,
    arguments: Mapping[str, Any],
    offered: Mapping[str, Any],
    *,
    stream: str | None = None,
) -> Part:
    """Build a part from its recipe's arguments and those offered facts that it names.

    Args:
        parts: The table of parts of its kind.
        name: Its name, which need not be in the table.
        arguments: What its constructor gets.
        offered: What its constructor gets if it names it.
        stream: The frames that it reads, for the message; None for a part that reads none.

    Raises:
        RecipeError: It refuses an argument; or another package's part is missing, fails, or is not
            what its place needs.
    """
    place, protocol = next((place, kind) for table, place, kind in PLACES if table is parts)
    part = find_part(parts, name)
    taken = {fact: value for fact, value in offered.items() if takes(part, fact)}
    try:
        built = part(**arguments, **taken)
    except PartError as error:
        key = f"{place}.{error.key}"
        reader = f" for {stream}" if stream else ""
        owner = f" of {stream}" if stream else ""
        raise RecipeError(
            f"{key} is {arguments[error.key]!r}{reader}, but {error.reason}.",
            hint=f"Set {key}{owner} to {error.advice}.",
        ) from error
    except Exception as error:  # whatever another package raises
        if not is_own(name):
            raise
        raise RecipeError(
            f"The part {name} cannot be built: {type(error).__name__}: {str(error).rstrip('.')}.",
            hint="Correct the package, or the recipe's keys for it.",
        ) from error
    if is_own(name):
        _require_contract(built, name, protocol)
    return built


def _require_contract(part: object, name: str, protocol: type) -> None:
    """Refuse another package's part that lacks what the wiring will ask of it."""
    needed = [member for member in vars(protocol) if not member.startswith("_")]
    missing = [member for member in needed if not hasattr(part, member)]
    see = f"ensemble_kit.parts.{protocol.__name__}"
    if missing:
        raise RecipeError(
            f"The part {name} has no {' and no '.join(missing)}.",
            hint=f"Give it what {see} describes.",
        )
    if not isinstance(part, nn.Module):
        raise RecipeError(
            f"The part {name} is no torch.nn.Module.", hint="Derive its class from torch.nn.Module."
        )


def build_pooling(table: AnyPoolingTable, stream: Stream, *, momentum: float) -> Pooling:
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
    parts: Parts[Pooling] = SEQUENCE_POOLINGS if is_sequence_pooling(table.name) else SET_POOLINGS
    return build_part(parts, table.name, arguments, offered, stream=stream.name)
