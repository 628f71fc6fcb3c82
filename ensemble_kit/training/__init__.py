"""Train one sub-model as the papers do, with checkpoints, a log, and a state to resume from.

Google's starter code (google/youtube-8m, ``train.py``) and every system built on it optimise alike:
Adam, a learning rate that falls in steps of so many examples, each variable's gradient clipped by
itself, cross entropy on probabilities, and an L2 penalty on the kernels of the head.
"""

from ensemble_kit.training.stage import train_checkpoints

__all__ = ["train_checkpoints"]
