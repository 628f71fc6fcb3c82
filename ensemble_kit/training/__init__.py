"""Train one sub-model: the papers' optimisation, checkpoints at steps, a log, a state to resume.

Google's starter code and every system built on it optimise alike (google/youtube-8m, ``train.py``):
Adam, a learning rate that falls in stairs of examples seen, each variable's gradient clipped by
itself, cross entropy on probabilities, an L2 penalty on the head's kernels.
"""

from ensemble_kit.training.stage import train_checkpoints

__all__ = ["train_checkpoints"]
