"""The log of a run: ``metrics.jsonl``, whose numbers trackers are given too."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from types import TracebackType
from typing import Any

from ensemble_kit.errors import OutputError, TrainingError
from ensemble_kit.store.trackers import OpenTracker
from ensemble_kit.texts import parse_json


class MetricsLog:
    """A log that is open for writing, after the lines that it already has.

    Args:
        path: The file of lines, one JSON object each.
        trackers: What is given the numbers of each line, and closed with the log.
    """

    def __init__(self, path: Path, *, trackers: Sequence[OpenTracker] = ()) -> None:
        self._trackers = trackers
        self._lines = path.open("a", encoding="utf-8")

    def write(self, *, step: int, **values: Any) -> None:
        """Write one line; whoever reads the file sees it at once.

        Args:
            step: The optimisation step that the values are of.
            values: What JSON can hold. Trackers are given its numbers, those in mappings too:
                ``validation={"gap": 0.8}`` is ``validation/gap``.

        Raises:
            OutputError: The disk refuses the line.
        """
        with self._errors_named():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
        for tracker in self._trackers:
            tracker.write(step, dict(_numbers(values)))

    def sync(self) -> None:
        """Return when the lines so far would outlast a power cut."""
        with self._errors_named():
            os.fsync(self._lines.fileno())

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self._lines.name} cannot be written: {error.strerror}.",
                hint="Free some space; the same command resumes from the last checkpoint.",
            ) from error

    def close(self) -> None:
        """Close the file and the trackers."""
        with self._errors_named():  # a line that could not be written is tried once more
            self._lines.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, each with a whole number ``step``; none where there is no file.

    A run that was killed may leave half a line, and a damaged file anything: what is no such line
    is left out, and so is a ``validation`` without a number ``gap``.

    Raises:
        TrainingError: The file cannot be read.
    """
    if not isfile(path):
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read: {error.strerror}.", hint="Name runs that you may read."
        ) from error
    return [line for line in map(parse_line, lines) if line is not None]


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Return a line of a log; None where it is not whole. See ``read_metrics``."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    validation = line.pop("validation", None)
    if isinstance(validation, dict) and _is_finite(validation.get("gap")):
        line["validation"] = validation
    return line


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and -1e300 < value < 1e300  # an int may be too large


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
