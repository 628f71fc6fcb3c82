"""The loss of Google's starter code: cross entropy on probabilities."""

from torch import Tensor

LOG_EPSILON = 1e-5


def cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return ``mean_b sum_c -(y log(p + 1e-5) + (1 - y) log(1 - p + 1e-5))``.

    The loss of Google's starter code (google/youtube-8m, ``losses.py``). It takes probabilities
    because a mixture of sigmoids has no logits. It is a sum over classes: C ln 2 if every
    probability is one half.

    Args:
        probabilities: ``(B, C)`` in [0, 1].
        labels: ``(B, C)``, 0 or 1, floating point.
    """
    positive = labels * (probabilities + LOG_EPSILON).log()
    negative = (1 - labels) * (1 - probabilities + LOG_EPSILON).log()
    return -(positive + negative).sum(dim=1).mean()
