"""What a calibrated file says its calibration brought, for people: its card, and the report."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ensemble_kit.errors import ProviderError
from ensemble_kit.serving.calibration import Calibration


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class BeforeAfter(_Facts):
    """A number without calibration, and with it."""

    before: float
    after: float


class Bins(_Facts):
    """Pairs of video and class by their probability; see ``calibration.counts.reliability``.

    Attributes:
        means: The mean probability of each bin.
        gaps: The share of its pairs that are labels, less that mean.
        pairs: How many pairs it has.
    """

    means: tuple[float, ...]
    gaps: tuple[float, ...]
    pairs: tuple[float, ...]

    @model_validator(mode="before")
    @classmethod
    def _named(cls, columns: Any) -> Any:
        return dict(zip(cls.model_fields, columns, strict=True))

    @model_validator(mode="after")
    def _agrees(self) -> "Bins":
        if not len(self.means) == len(self.gaps) == len(self.pairs) or not any(self.pairs):
            raise ValueError("the bins of a reliability diagram do not agree")
        return self

    @property
    def shares(self) -> list[float]:
        """The share of each bin's pairs that are labels."""
        return [mean + gap for mean, gap in zip(self.means, self.gaps, strict=True)]


class Reliability(_Facts):
    """The bins without calibration, and with it."""

    before: Bins
    after: Bins


class Level(_Facts):
    """What the thresholds of a wished precision brought; ``precision`` is None without a tag."""

    min_precision: float
    precision: float | None
    recall: float
    tags: float


class CalibrationFacts(_Facts):
    """What a calibration brought on videos that it was not fitted on.

    Attributes:
        measured_on: How many these videos are.
        videos: How many it was fitted on in the end.
        expected_calibration_error: See ``calibration.counts.expected_calibration_error``.
        gap: The GAP@20.
        reliability: What a reliability diagram shows.
        levels: Of each precision that thresholds were made for.
    """

    measured_on: int
    videos: int
    expected_calibration_error: BeforeAfter
    gap: BeforeAfter
    reliability: Reliability
    levels: tuple[Level, ...]


def calibration_facts(calibration: Calibration, source: object) -> CalibrationFacts:
    """Return what a calibration says of itself.

    Raises:
        ProviderError: It is damaged; the error names ``source``.
    """
    measured: Mapping[str, Any] = calibration.measured
    try:
        return CalibrationFacts.model_validate(measured)
    except (ValidationError, TypeError, ValueError) as error:
        raise ProviderError(
            f"{source}: the calibration is damaged.",
            hint="Calibrate the exported file again with `ensemble-kit calibrate`.",
        ) from error
