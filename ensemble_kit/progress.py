"""Progress for people: a bar on a terminal, plain lines elsewhere. Always on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 15.0


class Progress(Protocol):
    """What a stage may call while it works."""

    def update(self, done: int, message: str) -> None:
        """Say how many of the total are done, and what there is to say about it."""


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """Show how a piece of work goes on.

    Args:
        label: What is being done.
        total: How many units there are; 0 where it is not known.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}"),
        )
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            yield _Bar(bars, bars.add_task(label, total=total or None, message=""))
    else:
        yield _Lines(label, total)


class _Bar:
    def __init__(self, bars: "Bars", task: "TaskID") -> None:  # type: ignore[name-defined]  # noqa: F821
        self._bars = bars
        self._task = task

    def update(self, done: int, message: str) -> None:
        self._bars.update(self._task, completed=done, message=message)


class _Lines:
    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._last = time.monotonic()

    def update(self, done: int, message: str) -> None:
        is_last = done == self._total
        if is_last or time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            of = f"/{self._total}" if self._total else ""
            print(f"{self._label}: {done}{of}  {message}".rstrip(), file=sys.stderr, flush=True)
