"""The best classes of a few videos over time, as ``predict --window`` wrote them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ensemble_kit.errors import InputError
from ensemble_kit.validation import complaints

SHOWN_VIDEOS = 4  # the first ones of the file
SHOWN_CLASSES = 8  # of a video, those whose probability is the highest anywhere in it
MOST_WINDOWS = 5_000  # of a video; more cannot be told apart
MAKE = "Write it with `ensemble-kit predict MODEL DATA --window 5 -o windows.jsonl`."

Probability = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WindowLabel(_Strict):
    """A class of a window; see ``timeline.predict_windows``."""

    label: str
    number: Annotated[int, Field(alias="class", ge=0)]
    confidence: Probability


class WindowLine(_Strict):
    """A line of the file: the best classes of a window, from ``start`` to ``end`` in seconds."""

    video: str
    start: Seconds
    end: Seconds
    labels: Annotated[tuple[WindowLabel, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Timeline:
    """The classes of a video over time.

    Attributes:
        video: Its id.
        windows: Its windows.
        classes: The names of the classes to show, the one with the highest probability first.
    """

    video: str
    windows: tuple[WindowLine, ...]
    classes: tuple[str, ...]


def read_timelines(path: Path) -> list[Timeline]:
    """Return what the first videos of a file say.

    Raises:
        InputError: The file cannot be read, or a line is not what ``predict --window`` writes.
    """
    videos = groupby(_lines(path), key=lambda line: line.video)
    found = [
        _timeline(video, tuple(islice(lines, MOST_WINDOWS)))
        for video, lines in islice(videos, SHOWN_VIDEOS)
    ]
    if not found:
        raise InputError(f"{path} holds no windows.", hint=MAKE)
    return found


def _timeline(video: str, windows: tuple[WindowLine, ...]) -> Timeline:
    highest: dict[str, float] = {}
    for window in windows:
        for each in window.labels:
            highest[each.label] = max(highest.get(each.label, 0.0), each.confidence)
    ordered = sorted(highest, key=lambda label: (-highest[label], label))
    return Timeline(video, windows, tuple(ordered[:SHOWN_CLASSES]))


def _lines(path: Path) -> Iterator[WindowLine]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield WindowLine.model_validate_json(line)
                except ValidationError as error:
                    problem = complaints(error, WindowLine, owner="a window")[0].problem
                    raise InputError(
                        f"{path}: line {number} is no window of a video: {problem}.", hint=MAKE
                    ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"{path} cannot be read: {reason}.", hint=MAKE) from error
