"""Videos whose labels are drawn with known probabilities."""

import numpy as np

from ensemble_kit.data.labels import LabelLists


def drawn(num_videos, num_classes, *, seed=0, mean=-3.0):
    """Return true probabilities ``(N, C)``, and labels drawn with them."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(mean, 2, (num_videos, num_classes))
    true = 1 / (1 + np.exp(-logits))
    is_label = generator.random(true.shape) < true
    return true, LabelLists.from_lists([np.flatnonzero(row) for row in is_label])
