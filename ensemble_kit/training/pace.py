"""The speed of training, and the share of its time that it waits for batches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Counts examples and seconds between two lines of the log.

    Args:
        examples: How many examples the run has seen so far.
    """

    def __init__(self, examples: int) -> None:
        self.restart(examples)

    def restart(self, examples: int) -> None:
        """Start counting again, after a line has been written."""
        self._examples = examples
        self._waited = 0.0
        self._start = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a block as waiting for a batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out the time of a block that is not training, such as validation."""
        start = time.monotonic()
        yield
        self._start += time.monotonic() - start

    def figures(self, examples: int) -> dict[str, float]:
        """Return ``examples_per_second``, and ``data_wait`` in [0, 1], the share of time waited."""
        seconds = max(time.monotonic() - self._start, 1e-6)  # never 0
        return {
            "examples_per_second": round((examples - self._examples) / seconds, 1),
            "data_wait": round(self._waited / seconds, 4),
        }
