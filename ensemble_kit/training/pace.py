"""How fast training goes, and what share of its time it waits for batches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Counts examples and seconds from one line of the log to the next.

    Args:
        examples: How many the run has seen so far.
    """

    def __init__(self, examples: int) -> None:
        self.restart(examples)

    def restart(self, examples: int) -> None:
        """Begin again, as behind a line that has been written."""
        self._examples = examples
        self._waited = 0.0
        self._start = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a block as time in which there was no batch to train on."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of a block out: it is no training, such as validation."""
        start = time.monotonic()
        yield
        self._start += time.monotonic() - start

    def figures(self, examples: int) -> dict[str, float]:
        """Return ``examples_per_second``, and ``data_wait`` in [0, 1]: the share of time waited."""
        seconds = max(time.monotonic() - self._start, 1e-6)  # clocks may stand still for a step
        return {
            "examples_per_second": round((examples - self._examples) / seconds, 1),
            "data_wait": round(self._waited / seconds, 4),
        }
