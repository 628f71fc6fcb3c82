"""What a part of one's own is made of: the contracts, the tables of recipes, two common layers.

A package offers a part as an entry point of the group ``ensemble_kit.parts``; recipes name it
``package:part``. See docs/own-parts.md and examples/own_pooling.
"""

from ensemble_kit.layers.normalisation import BatchNorm, l2_normalise
from ensemble_kit.layers.protocols import (
    Fusion,
    Gating,
    Head,
    Model,
    PartError,
    Sampling,
    SequencePooling,
    SetPooling,
)
from ensemble_kit.recipes.tables import (
    HeadTable,
    ModelTable,
    PartTable,
    PerModality,
    PoolingTable,
    Size,
)

__all__ = [
    "BatchNorm",
    "Fusion",
    "Gating",
    "Head",
    "HeadTable",
    "Model",
    "ModelTable",
    "PartError",
    "PartTable",
    "PerModality",
    "PoolingTable",
    "Sampling",
    "SequencePooling",
    "SetPooling",
    "Size",
    "l2_normalise",
]
