"""The starter code's loss, on probabilities."""

from torch import Tensor

LOG_EPSILON = 1e-5


def cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return ``mean_b sum_c -(y log(p + 1e-5) + (1 - y) log(1 - p + 1e-5))``.

    The starter code's loss, in probability space because a mixture of sigmoids has no logits. A sum
    over classes, so C ln 2 where all probabilities are one half.

    Args:
        probabilities: ``(B, C)`` in [0, 1].
        labels: ``(B, C)``, 0 or 1, floating point.
    """
    positive = labels * (probabilities + LOG_EPSILON).log()
    negative = (1 - labels) * (1 - probabilities + LOG_EPSILON).log()
    return -(positive + negative).sum(dim=1).mean()
