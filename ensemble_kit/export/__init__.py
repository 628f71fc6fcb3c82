"""Export a fused file as one ONNX model."""

from ensemble_kit.export.stage import export_onnx

__all__ = ["export_onnx"]
