from math import floor, log

import numpy as np
import pytest
from calibration_cases import drawn

from ensemble_kit.calibration.counts import (
    CENTRES,
    NUM_BINS,
    Counts,
    expected_calibration_error,
    mean_log_loss,
)
from ensemble_kit.serving.calibration import sigmoid


def counts_of(probabilities, labels, step=50):
    counts = Counts.empty(probabilities.shape[1])
    for start in range(0, len(probabilities), step):
        rows = probabilities[start : start + step]
        counts.add(rows, labels.rows(start, start + len(rows)))
    return counts


def test_counts_are_those_of_a_loop_over_pairs():
    probabilities, labels = drawn(130, 3)
    probabilities[0] = [0.0, 1.0, 0.5]  # the ends, and the lower end of a bin
    pairs, positives = np.zeros((3, NUM_BINS)), np.zeros((3, NUM_BINS))
    for video, row in enumerate(probabilities):
        own = labels.rows(video, video + 1).classes
        for index, p in enumerate(row):
            logit = -99 if p == 0 else 99 if p == 1 else log(p / (1 - p))
            place = min(max(floor((logit + 12) * 16), 0), NUM_BINS - 1)
            pairs[index, place] += 1
            positives[index, place] += index in own

    counts = counts_of(probabilities, labels)

    assert (counts.pairs == pairs).all()
    assert (counts.positives == positives).all()
    assert counts.num_positives.tolist() == positives.sum(axis=1).tolist()


def test_the_log_loss_is_that_of_the_pairs_up_to_the_width_of_a_bin():
    probabilities, labels = drawn(400, 4)
    is_label = labels.dense(4)
    loss = -np.where(is_label, np.log(probabilities), np.log1p(-probabilities)).mean()

    found = mean_log_loss(counts_of(probabilities, labels), sigmoid(CENTRES)[None])

    assert found == pytest.approx(loss, abs=1 / 32)  # a half bin of logit changes a loss by no more


def test_the_calibration_error_is_the_distance_of_a_bins_mean_and_its_positives():
    counts = Counts.empty(1)
    low, high = NUM_BINS // 3, NUM_BINS // 2 + 20
    counts.pairs[0, [low, high]] = 30, 10
    counts.positives[0, [low, high]] = 3, 9
    means = sigmoid(CENTRES)[[low, high]]

    found = expected_calibration_error(counts, sigmoid(CENTRES)[None])

    expected = (30 * abs(3 / 30 - means[0]) + 10 * abs(9 / 10 - means[1])) / 40
    assert found == pytest.approx(expected)
