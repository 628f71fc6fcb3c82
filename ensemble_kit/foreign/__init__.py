"""Import a model that another framework wrote as an ONNX file."""

from ensemble_kit.foreign.stage import import_onnx

__all__ = ["import_onnx"]
