import json
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.serving.calibration import NEVER, Calibration, logit, sigmoid

CALIBRATION = Calibration(
    "isotonic",
    np.array([-2.0, 0.0, 2.0]),
    np.array([[-3.0, 0.0, 1.0], [-1.0, -0.5, 4.0]]),
    np.array([0.5, 0.9]),
    np.array([[0.25, 0.75], [0.5, NEVER]]),
    np.array([0.25, 0.5]),
    {"videos": 3},
)


def curve(values, logit):
    """The calibrated logit by the definition."""
    if logit <= -2:
        return values[0] + logit + 2
    if logit >= 2:
        return values[2] + logit - 2
    low = 0 if logit < 0 else 1
    return values[low] + (logit - 2 * (low - 1)) / 2 * (values[low + 1] - values[low])


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=2))
def test_a_probability_is_calibrated_as_the_file_says(row):
    found = CALIBRATION.calibrated(np.array([row]))

    for place, p in enumerate(row):
        expected = curve(CALIBRATION.values[place], log(p / (1 - p)))
        assert found[0, place] == pytest.approx(1 / (1 + exp(-expected)), abs=1e-6)


def test_0_and_1_stay_probabilities():
    found = CALIBRATION.calibrated(np.array([[0.0, 1.0]], np.float32))

    assert np.isfinite(found).all()
    assert 0 <= found[0, 0] < 1e-9
    assert 1 - 1e-6 < found[0, 1] <= 1
    assert sigmoid(logit(np.array([0.0, 1.0]))) == pytest.approx([0, 1], abs=1e-6)


def test_a_common_curve_serves_every_class():
    common = replace(CALIBRATION, values=CALIBRATION.values[:1])
    row = np.array([[0.2, 0.2]])

    assert (common.calibrated(row) == CALIBRATION.calibrated(row)[0, 0]).all()


@pytest.mark.parametrize(("wished", "column"), [(0.1, 0), (0.5, 0), (0.51, 1), (0.9, 1)])
def test_a_precision_takes_the_next_level(wished, column):
    assert (CALIBRATION.thresholds_for(wished) == CALIBRATION.thresholds[:, column]).all()


@pytest.mark.parametrize("wished", [0.95, 0.0, -1.0, float("nan")])
def test_a_precision_beyond_the_levels_is_refused(wished):
    with pytest.raises(ValueError, match=r"must be over 0 and at most 0\.9"):
        CALIBRATION.thresholds_for(wished)


def test_what_is_written_is_read():
    found = Calibration.from_json(CALIBRATION.to_json(), 2)

    assert found.method == "isotonic"
    assert found.measured == {"videos": 3}
    for name in ("knots", "values", "levels", "thresholds", "best_f1"):
        assert (getattr(found, name) == getattr(CALIBRATION, name)).all()


@pytest.mark.parametrize(
    "changed",
    [
        {"knots": [0.0]},
        {"knots": [2.0, 0.0, -2.0]},
        {"values": [[1.0, 2.0]]},
        {"values": [[1.0, 2.0, float("nan")], [1, 2, 3]]},
        {"levels": []},
        {"thresholds": [[0.5, 0.5]]},
        {"best_f1": [0.5]},
        {"best_f1": "x"},
        {"best_f1": [[0.5], 1]},
        {"measured": 3},
    ],
)
def test_a_damaged_calibration_is_refused(changed):
    text = json.dumps(json.loads(CALIBRATION.to_json()) | changed)

    with pytest.raises(ValueError, match="the calibration is damaged"):
        Calibration.from_json(text, 2)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "[" * 100_000])
def test_what_is_no_calibration_is_refused(text):
    with pytest.raises(ValueError, match="the calibration is damaged"):
        Calibration.from_json(text, 2)


def test_a_calibration_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="the calibration is damaged"):
        Calibration.from_json(CALIBRATION.to_json(), 3)
