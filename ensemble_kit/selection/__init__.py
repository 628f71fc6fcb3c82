"""Select the members of an ensemble."""

from ensemble_kit.selection.stage import select

__all__ = ["select"]
