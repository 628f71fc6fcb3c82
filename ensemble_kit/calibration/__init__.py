"""Calibrate an exported file, and give it thresholds for tags."""

from ensemble_kit.calibration.stage import calibrate

__all__ = ["calibrate"]
