"""Every part by the name that recipes give it, and how a recipe's table becomes one.

Literal tables: they grep, they type-check, and no import changes them. Imports ``layers``,
``recipes`` and ``recipe_tables``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import sqrt
from types import MappingProxyType
from typing import Any

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
from ensemble_kit.layers.non_local import NonLocal
from ensemble_kit.layers.recurrent import AttentionBiGRU, RecurrentPooling
from ensemble_kit.layers.se_gating import SEGating
from ensemble_kit.layers.second_order import SecondOrder
from ensemble_kit.layers.soft_bof import SoftBoF
from ensemble_kit.recipes.reading import for_modality
from ensemble_kit.recipes.tables import NonLocalTable, Pooling, Table

Parts = Mapping[str, Callable[..., nn.Module]]

SAMPLINGS: Parts = MappingProxyType(
    {
        "all": AllFrames,
        "random": RandomSampling,
        "random_sequence": SequenceSampling,
        "uniform": UniformSampling,
    }
)
# Order-free: described once, aggregated for each repeat.
SET_POOLINGS: Parts = MappingProxyType(
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
# Run on the frames themselves, once a repeat.
SEQUENCE_POOLINGS: Parts = MappingProxyType(
    {
        "attention_bigru": AttentionBiGRU,
        "attention_netvlad": AttentionNetVLAD,
        "bigru": partial(RecurrentPooling, cell="gru", is_bidirectional=True),
        "bilstm": partial(RecurrentPooling, cell="lstm", is_bidirectional=True),
        "gru": partial(RecurrentPooling, cell="gru", is_bidirectional=False),
        "lstm": partial(RecurrentPooling, cell="lstm", is_bidirectional=False),
    }
)
FUSIONS: Parts = MappingProxyType(
    {
        "concat": modality_fusion.Concat,
        "fc_concat": modality_fusion.FCConcat,
        "mfb": modality_fusion.MFB,
        "projection": modality_fusion.Projection,
        "shared": modality_fusion.SharedSpace,
        "single": modality_fusion.Concat,
    }
)
GATINGS: Parts = MappingProxyType({"context_gating": ContextGating, "glu": GLU, "se": SEGating})
HEADS: Parts = MappingProxyType({"logistic": Logistic, "mixture_of_experts": MixtureOfExperts})

WITHOUT_BATCH_NORM = frozenset({"average", "attention_bigru", "bigru", "bilstm", "gru", "lstm"})
OF_TWO = frozenset({"mfb", "projection"})  # fusions of exactly two modalities
WIRING_KEYS = frozenset({"name", "modality_fusion", "probability_gating", "remove_diagonal"})


def arguments_of(table: Table) -> dict[str, Any]:
    """Return a part's own arguments: the table without what the wiring reads, or leaves out."""
    return {
        key: value
        for key, value in dict(table).items()
        if key not in WIRING_KEYS and value is not None
    }


def build_pooling(
    table: Pooling,
    modality: str,
    width: int,
    *,
    momentum: float,
    num_sampled: int | None,
    is_first: bool,
) -> nn.Module:
    """Build the pooling of one stream of frames.

    Args:
        table: The recipe's pooling.
        modality: The stream's name, which picks the values of per-modality arguments.
        width: D, the features of one frame.
        momentum: Of batch norms.
        num_sampled: N, the frames that sampling takes; None for all frames.
        is_first: Whether the stream is the schema's first; gated BoF gates no other.

    Raises:
        RecipeError: A per-modality argument does not name the modality, features do not divide
            into heads or groups, or attention similarities have no fixed number of frames.
    """
    name = table.name
    arguments: dict[str, Any] = {
        key: for_modality(value, modality, key=f"pooling.{key}")
        if isinstance(value, dict)
        else value
        for key, value in arguments_of(table).items()
    }
    if name not in WITHOUT_BATCH_NORM:
        arguments["momentum"] = momentum
    if "non_local" in arguments:
        arguments["non_local"] = _non_local(
            arguments["non_local"], width, arguments["num_clusters"]
        )
    if name == "attention_netvlad":
        _require_divisor("num_heads", arguments["num_heads"], width, modality)
        if num_sampled is None and arguments["similarity"] == "attention":
            raise RecipeError(
                "pooling.similarity is 'attention', which takes a fixed number of frames, but "
                "sampling.name is 'all'.",
                hint="Use --set 'sampling={name=\"uniform\", num_frames=256}'.",
            )
        arguments["num_frames"] = num_sampled
    if name == "nextvlad":
        wide = arguments["expansion"] * width
        _require_divisor("num_groups", arguments["num_groups"], wide, modality)
    if name == "gated_bof" and not is_first:
        del arguments["gate_rank"]
        name = "soft_bof"
    part = SET_POOLINGS.get(name) or SEQUENCE_POOLINGS[name]
    return part(num_features=width, **arguments)


def _require_divisor(key: str, divisor: int, num_features: int, modality: str) -> None:
    if num_features % divisor:
        raise RecipeError(
            f"pooling.{key} is {divisor} for {modality}, but {num_features} features do not divide "
            f"into {divisor}.",
            hint=f"Set pooling.{key} of {modality} to a divisor of {num_features}.",
        )


def _non_local(table: NonLocalTable, width: int, num_clusters: int) -> NonLocal:
    inner = {"num_clusters": num_clusters, "half_features": width // 2}
    size = table.inner_size if isinstance(table.inner_size, int) else inner[table.inner_size]
    temperature = 1 / sqrt(width) if isinstance(table.temperature, str) else table.temperature
    return NonLocal(num_features=width, inner_size=size, temperature=temperature)
