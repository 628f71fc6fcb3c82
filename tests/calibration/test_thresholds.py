import numpy as np
import pytest
from calibration_cases import drawn

from ensemble_kit.calibration.counts import CENTRES, Counts
from ensemble_kit.calibration.thresholds import (
    EDGES,
    LEVELS,
    SHRINKAGE,
    best_f1_thresholds,
    precision_thresholds,
    tagged,
)
from ensemble_kit.serving.calibration import NEVER, sigmoid

GIVEN = sigmoid(CENTRES)[None]


def counted(num_videos=500, num_classes=3):
    true, labels = drawn(num_videos, num_classes, mean=-1.0)
    counts = Counts.empty(num_classes)
    counts.add(true, labels)
    return counts


def test_a_threshold_is_the_least_with_the_precision():
    counts = counted()
    for row in range(3):
        pairs, positives = counts.pairs[row], counts.positives[row]
        for level, found in zip(LEVELS, precision_thresholds(counts, GIVEN)[row], strict=True):
            reached = []
            for place in range(len(EDGES)):
                tags, hits = pairs[place:].sum(), positives[place:].sum()
                promised = (
                    (pairs[place:] * GIVEN[0, place:]).sum() / tags if tags else GIVEN[0, place]
                )
                if (hits + SHRINKAGE * promised) / (tags + SHRINKAGE) >= level:
                    reached.append(EDGES[place])
            assert found == (min(reached) if reached else NEVER)


def test_a_precision_that_is_never_reached_gives_no_tag():
    counts = counted()
    counts.positives[1] = 0
    hopeless = np.full_like(GIVEN, 0.1)

    thresholds = precision_thresholds(counts, hopeless)

    assert (thresholds[1] == NEVER).all()
    assert tagged(counts, np.full(3, NEVER)) == (0, 0)


def test_the_best_f1_is_that_of_a_loop():
    counts = counted(200)
    total = counts.positives.sum()
    for row, found in enumerate(best_f1_thresholds(counts, GIVEN)):
        scores = []
        for place in range(len(EDGES)):
            common_hits = counts.positives[:, place:].sum() / total
            common_tags = counts.pairs[:, place:].sum() / total
            hits = counts.positives[row, place:].sum() + SHRINKAGE * common_hits
            tags = counts.pairs[row, place:].sum() + SHRINKAGE * common_tags
            scores.append(2 * hits / (tags + counts.positives[row].sum() + SHRINKAGE))
        assert found == EDGES[int(np.argmax(scores))]


def test_a_class_without_positives_has_about_the_threshold_of_all():
    counts = counted(5000, 4)
    counts.pairs[3], counts.positives[3] = 0, 0

    of_all = best_f1_thresholds(
        Counts(counts.pairs.sum(axis=0)[None], counts.positives.sum(axis=0)[None]), GIVEN
    )

    assert best_f1_thresholds(counts, GIVEN)[3] == of_all[0]


def test_tags_are_counted_from_each_threshold_upwards():
    counts = counted(300, 2)
    thresholds = EDGES[[200, 100]]

    tags, hits = tagged(counts, thresholds)

    assert tags == counts.pairs[0, 200:].sum() + counts.pairs[1, 100:].sum()
    assert hits == counts.positives[0, 200:].sum() + counts.positives[1, 100:].sum()


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_true_probabilities_give_the_precision_that_was_wished_for(level):
    counts, others = counted(4000, 10), Counts.empty(10)
    true, labels = drawn(4000, 10, seed=7, mean=-1.0)
    others.add(true, labels)
    column = int(np.flatnonzero(level == LEVELS)[0])

    tags, hits = tagged(others, precision_thresholds(counts, GIVEN)[:, column])

    assert hits / tags == pytest.approx(level, abs=4 * (level * (1 - level) / tags) ** 0.5 + 0.01)
