"""Run an exported ensemble with NumPy and ONNX Runtime alone: the public face of ``serving``."""

from ensemble_kit.serving.session import OnnxEnsemble, Tags

__all__ = ["OnnxEnsemble", "Tags"]
