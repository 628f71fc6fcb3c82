"""Every order-free pooling, small, and what their tests share."""

from collections.abc import Sequence
from functools import partial

import torch
from builders import stir
from reference import Statistics
from torch import Tensor, nn

from ensemble_kit.layers.average_pooling import AveragePooling
from ensemble_kit.layers.dbof import DBoF
from ensemble_kit.layers.gated_bof import GatedBoF
from ensemble_kit.layers.net_fv import NetFV
from ensemble_kit.layers.netvlad import NetVLAD
from ensemble_kit.layers.nextvlad import NeXtVLAD
from ensemble_kit.layers.non_local import NonLocalArguments
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import SecondOrder
from ensemble_kit.layers.soft_bof import SoftBoF

CLUSTERS = {"num_clusters": 3, "momentum": 0.1}


def _with_non_local(*, has_centres: bool) -> NetVLAD:
    block = NonLocalArguments(inner_size=4, temperature=0.5)
    return NetVLAD(num_features=5, **CLUSTERS, has_centres=has_centres, non_local=block)


POOLINGS = {
    "average": partial(AveragePooling, num_features=5),
    "dbof_average": partial(
        DBoF, num_features=5, **CLUSTERS, activation="relu6", over_frames="average"
    ),
    "dbof_max": partial(DBoF, num_features=5, **CLUSTERS, activation="sigmoid", over_frames="max"),
    "gated_bof": partial(GatedBoF, num_features=5, **CLUSTERS, gate_rank=2),
    "net_fv": partial(NetFV, num_features=5, **CLUSTERS),
    "netrvlad": partial(NetVLAD, num_features=5, **CLUSTERS, has_centres=False),
    "netvlad": partial(NetVLAD, num_features=5, **CLUSTERS),
    "nextvlad": partial(NeXtVLAD, num_features=5, **CLUSTERS, expansion=2, num_groups=2),
    "non_local_netrvlad": partial(_with_non_local, has_centres=False),
    "non_local_netvlad": partial(_with_non_local, has_centres=True),
    "second_order": partial(SecondOrder, num_features=5, **CLUSTERS, reduced_size=2),
    "soft_bof": partial(SoftBoF, num_features=5, **CLUSTERS),
}


def build(name: str) -> nn.Module:
    """Return a pooling of 5 features and 3 clusters in float64, in training mode."""
    torch.manual_seed(0)
    return stir(POOLINGS[name]().double())


def pool(layer: nn.Module, frames: Tensor, weights: Tensor) -> Tensor:
    """Describe frames ``(B, T, D)`` and aggregate them for each repeat of ``(B, R, T)``."""
    return layer.aggregate(layer.describe(frames, weights[:, 0]), weights)


def repeated(rows: Sequence, counts: Sequence[int]) -> list:
    """Each row as often as it counts."""
    return [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]


def statistics_of(norm: BatchNorm) -> Statistics:
    """What a batch norm computes with outside training, for the loops."""
    tensors = norm.running_mean, norm.running_variance, norm.scale, norm.shift
    return tuple(tensor.tolist() for tensor in tensors)
