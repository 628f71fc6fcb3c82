"""What turns an ensemble's probabilities into tags: calibrated probabilities and thresholds.

A file that was calibrated carries it as one property, JSON. With ``knots`` x_1 < ... < x_K evenly
spaced, and ``values`` y of a class, a probability p becomes ``sigmoid(f(logit(p)))``, where f is
linear between the knots, ``f(x_k) = y_k``, and has the slope 1 beyond both ends. A class is a tag
of a video where its probability, as the graph gives it, is at least the class's threshold.

NumPy only, so that a server needs nothing more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.errors import ProviderError

PROPERTY = "calibration"
ARRAYS = ("knots", "values", "levels", "thresholds", "best_f1")
NEVER = 2.0  # a threshold that no probability reaches
SMALLEST, LARGEST = 1e-12, 1 - 1e-7  # probabilities whose logits are told apart in float32

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibrated probabilities and thresholds of C classes.

    Attributes:
        method: How probabilities were calibrated: ``none``, ``temperature``, ``platt`` or
            ``isotonic``.
        knots: ``(K,)``, logits, evenly spaced.
        values: ``(C, K)``, or ``(1, K)`` where all classes have the same; the calibrated logits.
        levels: ``(L,)``, precisions, ascending.
        thresholds: ``(C, L)``, the probabilities from which on a class has each precision;
            ``NEVER`` where it never has.
        best_f1: ``(C,)``, the thresholds of the best F1.
        measured: What it brought on videos that it was not fitted on, for people to read.
    """

    method: str
    knots: Floats
    values: Floats
    levels: Floats
    thresholds: Floats
    best_f1: Floats
    measured: Mapping[str, Any]

    def calibrated(self, probabilities: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return calibrated probabilities ``(B, C)`` of those that the graph gave."""
        return sigmoid(interpolated(logit(probabilities), self.knots, self.values)).astype(
            np.float32
        )

    def thresholds_for(self, min_precision: float | None) -> Floats:
        """Return the thresholds ``(C,)`` of a precision, or of the best F1 with None.

        Raises:
            ValueError: The precision is over the highest that thresholds were made for.
        """
        if min_precision is None:
            return self.best_f1
        place = int(np.searchsorted(self.levels, min_precision - 1e-9))
        if not min_precision > 0 or place == len(self.levels):
            raise ValueError(
                f"min_precision is {min_precision}; it must be over 0 and at most "
                f"{self.levels[-1]:g}, the highest that thresholds were made for"
            )
        return self.thresholds[:, place]

    def to_json(self) -> str:
        """Return it as JSON, with numbers of six digits."""
        lists = {name: _as_lists(array) for name, array in self._arrays().items()}
        return json.dumps({"method": self.method, **lists, "measured": dict(self.measured)})

    @classmethod
    def from_json(cls, text: str, num_classes: int) -> "Calibration":
        """Return what ``to_json`` wrote.

        Raises:
            ValueError: It is damaged, or of another number of classes.
        """
        try:
            found = json.loads(text)
            arrays = {name: np.array(found[name], np.float64) for name in ARRAYS}
            calibration = cls(str(found["method"]), **arrays, measured=dict(found["measured"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError("the calibration is damaged") from error
        if not calibration._is_whole(num_classes):
            raise ValueError("the calibration is damaged")
        return calibration

    @classmethod
    def of(cls, properties: Mapping[str, str], source: object) -> "Calibration | None":
        """Return the calibration of a model that has these properties, or None.

        Args:
            properties: The properties of the kit, without its prefix.
            source: What an error calls the model.

        Raises:
            ProviderError: The calibration is damaged.
        """
        text = properties.get(PROPERTY)
        if text is None:
            return None
        try:
            return cls.from_json(text, len(json.loads(properties["label_names"])))
        except ValueError as error:
            raise ProviderError(
                f"{source}: {error}.",
                hint="Calibrate the exported file again with `ensemble-kit calibrate`.",
            ) from error

    def _arrays(self) -> dict[str, Floats]:
        return {name: getattr(self, name) for name in ARRAYS}

    def _is_whole(self, num_classes: int) -> bool:
        """Return whether the arrays are those of a calibration of C classes."""
        knots, levels = self.knots.size, self.levels.size
        shapes = (self.knots.shape, self.levels.shape, self.thresholds.shape, self.best_f1.shape)
        return (
            knots > 1
            and levels > 0
            and shapes == ((knots,), (levels,), (num_classes, levels), (num_classes,))
            and self.values.shape in ((num_classes, knots), (1, knots))
            and all(bool(np.isfinite(array).all()) for array in self._arrays().values())
            and bool((np.diff(self.knots) > 0).all() and (np.diff(self.levels) > 0).all())
        )


def logit(probabilities: NDArray[np.floating[Any]]) -> Floats:
    """Return ``log(p / (1 - p))``, finite at 0 and 1 too."""
    bounded = np.clip(np.asarray(probabilities, np.float64), SMALLEST, LARGEST)
    odds: Floats = np.log(bounded) - np.log1p(-bounded)
    return odds


def sigmoid(logits: Floats) -> Floats:
    """Return ``1 / (1 + exp(-x))``."""
    result: Floats = 0.5 * (1 + np.tanh(0.5 * logits))
    return result


def interpolated(logits: Floats, knots: Floats, values: Floats) -> Floats:
    """Return f of logits ``(B, C)``; see the top of this file.

    Args:
        logits: ``(B, C)``.
        knots: ``(K,)``, evenly spaced.
        values: ``(C, K)`` or ``(1, K)``.
    """
    inside = np.clip(logits, knots[0], knots[-1])
    places = (inside - knots[0]) / (knots[1] - knots[0])
    lower = np.minimum(places.astype(np.int64), knots.size - 2)
    rows = np.arange(values.shape[0])[None, :] if len(values) > 1 else np.zeros((1, 1), np.int64)
    left, right = values[rows, lower], values[rows, lower + 1]
    result: Floats = left + (places - lower) * (right - left) + (logits - inside)
    return result


def _as_lists(array: Floats) -> Any:
    rounded = [float(f"{value:.6g}") for value in array.reshape(-1)]
    return np.array(rounded).reshape(array.shape).tolist()
