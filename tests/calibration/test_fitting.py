import numpy as np
import pytest
from calibration_cases import drawn

from ensemble_kit.calibration.counts import CENTRES, Counts, mean_log_loss
from ensemble_kit.calibration.fitting import (
    KNOTS,
    METHODS,
    PRIOR,
    PSEUDO,
    _rising,
    isotonic,
    platt,
    temperature,
)
from ensemble_kit.serving.calibration import logit, sigmoid


def counted(probabilities, labels):
    counts = Counts.empty(probabilities.shape[1])
    counts.add(probabilities, labels)
    return counts


def test_one_temperature_is_found_again():
    true, labels = drawn(4000, 8)
    sharpened = sigmoid(2.5 * logit(true))

    curve = temperature(counted(sharpened, labels))

    slope = np.diff(curve.values[0]) / np.diff(curve.knots)
    assert slope == pytest.approx(1 / 2.5, rel=0.05)


def test_the_scale_and_bias_of_a_class_minimise_its_penalised_loss():
    true, labels = drawn(600, 3, mean=-1.0)
    counts = counted(sigmoid(logit(true) * [0.5, 1, 2] + [1, 0, -1]), labels)
    pooled = Counts(counts.pairs.sum(axis=0)[None], counts.positives.sum(axis=0)[None])

    def line(curve):
        scale = np.diff(curve.values, axis=1)[:, 0] / np.diff(curve.knots)
        return scale, curve.values[:, 0] - scale * curve.knots[0]

    def loss(row, scale, bias, penalty, centre):
        given = sigmoid(scale * CENTRES + bias)
        negatives = row.pairs[0] - row.positives[0]
        total = -(row.positives[0] @ np.log(given) + negatives @ np.log1p(-given))
        return total + penalty / 2 * ((scale - centre[0]) ** 2 + (bias - centre[1]) ** 2)

    scales, biases = line(platt(counts))
    common = [value[0] for value in line(platt(pooled))]

    centre = min(  # of all classes together, with a penalty of 1 from (1, 0)
        (loss(pooled, scale, bias, 1.0, (1, 0)), scale, bias)
        for scale in np.linspace(common[0] - 0.2, common[0] + 0.2, 81)
        for bias in np.linspace(common[1] - 0.2, common[1] + 0.2, 81)
    )[1:]
    for index, (scale, bias) in enumerate(zip(scales, biases, strict=True)):
        row = Counts(counts.pairs[[index]], counts.positives[[index]])
        least = loss(row, scale, bias, PRIOR, centre)
        for other in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)):
            assert loss(row, scale + other[0], bias + other[1], PRIOR, centre) > least


def test_the_rising_function_is_the_nearest_of_all():
    generator = np.random.default_rng(1)
    for _ in range(20):
        pairs = generator.integers(1, 9, 12).astype(float)
        hits = np.floor(pairs * generator.random(12))
        found = _rising(hits, pairs)
        # min-max formula of isotonic regression (Barlow et al. 1972)
        sums = np.concatenate([[0], hits.cumsum()]), np.concatenate([[0], pairs.cumsum()])
        expected = [
            max(
                min((sums[0][j] - sums[0][i]) / (sums[1][j] - sums[1][i]) for j in range(k + 1, 13))
                for i in range(k + 1)
            )
            for k in range(12)
        ]
        assert found == pytest.approx(expected)


def test_a_class_without_videos_has_what_all_classes_say():
    true, labels = drawn(2000, 2, mean=0.0)
    counts = counted(sigmoid(2 * logit(true)), labels)
    counts.pairs[1], counts.positives[1] = 0, 0

    curve = isotonic(counts)

    places = np.rint((CENTRES + 8) / 0.5).clip(0, 32).astype(int)
    pairs = np.bincount(places, counts.pairs[0], 33)
    hits = np.bincount(places, counts.positives[0], 33)
    common = _rising(hits + sigmoid(KNOTS), pairs + 1)
    assert sigmoid(curve.values[1]) == pytest.approx(common, abs=1e-6)
    own = _rising(hits + PSEUDO * common, pairs + PSEUDO)
    assert sigmoid(curve.values[0]) == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_higher_probability_is_never_calibrated_to_a_lower_one(method):
    true, labels = drawn(300, 6)
    curve = METHODS[method](counted(sigmoid(1.7 * logit(true) + 1), labels))

    assert (np.diff(curve.values, axis=1) >= 0).all()


def test_fits_lower_the_loss_of_other_videos():
    true, labels = drawn(4000, 6)
    counts = [
        counted(sigmoid(2.5 * logit(true[part]) + 1), labels.rows(part.start, part.stop))
        for part in (slice(0, 2000), slice(2000, 4000))
    ]

    losses = [mean_log_loss(counts[1], fit(counts[0]).at_bins) for fit in METHODS.values()]

    assert losses[0] > losses[1] > losses[2]  # none, temperature, platt: scale and bias are wrong
    assert losses[0] > losses[3]
