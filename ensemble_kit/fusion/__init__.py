"""Fuse the members of a selection into one file."""

from ensemble_kit.fusion.stage import fuse

__all__ = ["fuse"]
