"""The log of a run: ``metrics.jsonl``, and the same numbers for TensorBoard on request."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ensemble_kit.errors import OutputError, TrainingError
from ensemble_kit.texts import parse_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """A log that is open for writing, after the lines that it already has.

    Args:
        path: The file of lines, one JSON object each.
        tensorboard: The folder for TensorBoard's event files; None writes none.
        after_step: The last step that is logged already: TensorBoard drops later ones.

    Raises:
        TrainingError: TensorBoard is asked for and is not installed.
    """

    def __init__(self, path: Path, *, tensorboard: Path | None = None, after_step: int = 0) -> None:
        self._scalars = None if tensorboard is None else _scalars(tensorboard, after_step)
        self._lines = path.open("a", encoding="utf-8")

    def write(self, *, step: int, **values: Any) -> None:
        """Write one line; whoever reads the file sees it at once.

        Args:
            step: The optimisation step that the values are of.
            values: What JSON can hold. Its numbers, those in mappings too, are TensorBoard's
                scalars: ``validation={"gap": 0.8}`` is ``validation/gap``.

        Raises:
            OutputError: The disk refuses the line.
        """
        with self._errors_named():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
        if self._scalars is not None:
            for name, value in _numbers(values):
                self._scalars.add_scalar(name, value, step)
            self._scalars.flush()

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
        """Close all files."""
        with self._errors_named():  # a line that could not be written is tried once more
            self._lines.close()
        if self._scalars is not None:
            self._scalars.close()

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


def require_tensorboard() -> None:
    """Raise ``TrainingError`` unless TensorBoard is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            "TensorBoard is not installed.",
            hint="Run `pip install 'ensemble-kit[tensorboard]'`, or leave --tensorboard out.",
        ) from error


def _scalars(folder: Path, after_step: int) -> "SummaryWriter":
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=after_step + 1)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
