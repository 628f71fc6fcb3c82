"""A video as windows of some seconds, each tagged as if it were a video."""

from math import isfinite
from typing import NamedTuple


class Window(NamedTuple):
    """Frames ``start`` to ``stop - 1`` of a video."""

    start: int
    stop: int


def windows(
    num_frames: int, *, length: float, stride: float, frames_per_second: float
) -> list[Window]:
    """Return the windows of a video.

    Window i starts at the frame nearest to ``i`` strides, and has as many frames as the length is
    nearest to; the last ones are as long as the video lasts. There is one for each start that lies
    in the video.

    Args:
        num_frames: T, at least 1.
        length: Of a window, in seconds.
        stride: From the start of one window to the next, in seconds; less than the length makes
            them overlap.
        frames_per_second: How many frames are a second.

    Raises:
        ValueError: The length or the stride is less than a frame, or not finite.
    """
    for name, seconds in (("window", length), ("stride", stride)):
        if not (isfinite(seconds) and seconds * frames_per_second >= 1):
            raise ValueError(
                f"a {name} of {seconds:g} s is shorter than a frame; there are "
                f"{frames_per_second:g} a second"
            )
    size = round(length * frames_per_second)
    found: list[Window] = []
    while (start := round(len(found) * stride * frames_per_second)) < num_frames:
        found.append(Window(start, min(start + size, num_frames)))
    return found
