"""Average the checkpoints of one run."""

from ensemble_kit.averaging.stage import average_checkpoints, average_run

__all__ = ["average_checkpoints", "average_run"]
