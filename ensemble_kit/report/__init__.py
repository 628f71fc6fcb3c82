"""Report: one HTML page of a selection, and what every model of a workspace scores on records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One model's line.

    Attributes:
        model: The run's name, or ``ensemble``.
        form: ``last checkpoint``, ``averaged``, ``fused bf16``, ``onnx``, …
        repeats: Draws averaged.
        k: How many classes of each video GAP looks at.
        gap: GAP@k on the records.
        hit_at_1: Hit@1 on them.
        num_bytes: The file's size.
        seconds_per_video: How long it took, the reading of the records included.
    """

    model: str
    form: str
    repeats: int
    k: int
    gap: float
    hit_at_1: float
    num_bytes: int
    seconds_per_video: float
