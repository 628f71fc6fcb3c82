"""Train, average, select, fuse and export video-tagging ensembles that fit in one file.

Importing this package is light: a name's module, and with it torch, is imported on first use.
"""

import importlib
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ensemble_kit._version import __version__ as __version__

# OpenMP's threads spin while they wait, and where anything else runs on the machine that makes
# training 15 times slower. OpenMP reads this when torch loads it; who has set it keeps his value.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from ensemble_kit.averaging import average_checkpoints
    from ensemble_kit.calibration import calibrate
    from ensemble_kit.data.conversion import convert
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.data.download import download_audioset, download_youtube8m
    from ensemble_kit.export import export_onnx
    from ensemble_kit.foreign import import_onnx
    from ensemble_kit.fusion import fuse
    from ensemble_kit.inference import predict
    from ensemble_kit.networks.loading import load
    from ensemble_kit.networks.sub_model import SubModel
    from ensemble_kit.pipeline import train
    from ensemble_kit.recipes.reading import load_recipe
    from ensemble_kit.selection import select
    from ensemble_kit.serving.triton import TritonConfig
    from ensemble_kit.training.plan import RunPlan

__all__ = [
    "Records",
    "RunPlan",
    "SubModel",
    "TritonConfig",
    "average_checkpoints",
    "calibrate",
    "convert",
    "download_audioset",
    "download_youtube8m",
    "export_onnx",
    "fuse",
    "import_onnx",
    "load",
    "load_recipe",
    "predict",
    "select",
    "train",
]

_HOMES: Mapping[str, str] = MappingProxyType(
    {
        "Records": "data.dataset",
        "RunPlan": "training.plan",
        "SubModel": "networks.sub_model",
        "TritonConfig": "serving.triton",
        "average_checkpoints": "averaging",
        "calibrate": "calibration",
        "convert": "data.conversion",
        "download_audioset": "data.download",
        "download_youtube8m": "data.download",
        "export_onnx": "export",
        "fuse": "fusion",
        "import_onnx": "foreign",
        "load": "networks.loading",
        "load_recipe": "recipes.reading",
        "predict": "inference",
        "select": "selection",
        "train": "pipeline",
    }
)


def __getattr__(name: str) -> Any:
    """Import a name of the public API when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
