"""Progress for people: a bar on a terminal, plain lines elsewhere. Always on stderr."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from types import MappingProxyType
from typing import Protocol

SECONDS_BETWEEN = 15.0  # of two plain lines
# How a value is written, by the name that `update` takes it under; in this order.
VALUES: Mapping[str, str] = MappingProxyType(
    {
        "loss": "loss {:.3f}",
        "gap": "GAP {:.4f}",
        "learning_rate": "rate {:.3g}",
        "examples_per_second": "{:,.0f} examples/s",
        "data_wait": "{:.0%} waiting for data",
    }
)
_is_quiet = ContextVar("is_quiet", default=False)


class Progress(Protocol):
    """What a stage may call while it works."""

    def update(self, done: int, message: str = "", /, **values: float | None) -> None:
        """Report how far the work has come.

        Args:
            done: How many of the total are done, including those before the start.
            message: What else there is to say.
            values: Numbers to be shown, named as in ``VALUES``; those that are None are left out.
        """


@contextmanager
def progress(
    label: str, total: int, *, done: int = 0, seconds_between: float = SECONDS_BETWEEN
) -> Iterator[Progress]:
    """Show how far a piece of work has come.

    Args:
        label: What is being done.
        total: How many units there are; 0 where it is not known.
        done: How many of them were done before this started; they do not count in the estimate
            of the time that is left.
        seconds_between: How long after a plain line the next may follow; the last is always shown.
    """
    if is_quiet():
        yield _Nothing()
    elif sys.stderr.isatty():
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
            yield _Bar(bars, bars.add_task(label, total=total or None, completed=done, message=""))
    else:
        yield _Lines(label, total, done, seconds_between)


def is_quiet() -> bool:
    """Return whether nothing is shown."""
    return _is_quiet.get()


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress of what is done in this block."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


class _Nothing:
    def update(self, done: int, message: str = "", /, **values: float | None) -> None:
        pass


class _Bar:
    def __init__(self, bars: "Bars", task: "TaskID") -> None:  # type: ignore[name-defined]  # noqa: F821
        self._bars = bars
        self._task = task

    def update(self, done: int, message: str = "", /, **values: float | None) -> None:
        self._bars.update(self._task, completed=done, message=_text_of(values, message))


class _Lines:
    def __init__(self, label: str, total: int, done: int, seconds_between: float) -> None:
        self._label = label
        self._total = total
        self._done_before = done
        self._seconds_between = seconds_between
        self._start = self._last = time.monotonic()

    def update(self, done: int, message: str = "", /, **values: float | None) -> None:
        is_last = done == self._total
        if is_last or time.monotonic() - self._last >= self._seconds_between:
            self._last = time.monotonic()
            of = f"/{self._total}" if self._total else ""
            text = _text_of(values, message, self._time_left(done))
            print(f"{self._label}: {done}{of}  {text}".rstrip(), file=sys.stderr, flush=True)

    def _time_left(self, done: int) -> str:
        if not self._done_before < done < self._total:
            return ""
        seconds_each = (time.monotonic() - self._start) / (done - self._done_before)
        return f"{timedelta(seconds=round(seconds_each * (self._total - done)))} left"


def _text_of(values: Mapping[str, float | None], *texts: str) -> str:
    order = list(VALUES)
    numbers = [
        VALUES[name].format(value)
        for name, value in sorted(values.items(), key=lambda item: order.index(item[0]))
        if value is not None
    ]
    return "  ".join(filter(None, (*numbers, *texts)))
