"""Average the checkpoints of one run."""

from ensemble_kit.averaging.stage import average_checkpoints

__all__ = ["average_checkpoints"]
