"""One line of the table of scores; apart from ``scores``, so that the page needs no torch."""

from dataclasses import dataclass

ENSEMBLE = "ensemble"  # what fused and exported files are called


@dataclass(frozen=True)
class Row:
    """What one model scored on records.

    Attributes:
        model: The run's name, or ``ENSEMBLE``.
        form: ``last checkpoint``, ``averaged``, ``fused bf16``, ``onnx``, …
        repeats: How many test-time draws were averaged.
        k: How many classes of each video count in GAP.
        gap: GAP@k on the records.
        hit_at_1: Hit@1 on the records.
        num_bytes: The file's size.
        seconds_per_video: How long a video took, reading its record included.
    """

    model: str
    form: str
    repeats: int
    k: int
    gap: float
    hit_at_1: float
    num_bytes: int
    seconds_per_video: float
