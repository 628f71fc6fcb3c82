import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.serving.windows import windows


@pytest.mark.parametrize(
    ("num_frames", "length", "stride", "rate", "expected"),
    [
        (10, 5, 5, 1, [(0, 5), (5, 10)]),
        (11, 5, 5, 1, [(0, 5), (5, 10), (10, 11)]),
        (7, 4, 2, 1, [(0, 4), (2, 6), (4, 7), (6, 7)]),
        (7, 2, 3, 1, [(0, 2), (3, 5), (6, 7)]),
        (6, 1.5, 1.5, 2, [(0, 3), (3, 6)]),
        (8, 2, 2.5, 1, [(0, 2), (2, 4), (5, 7)]),  # 2.5 is rounded to 2, 7.5 to 8
        (8, 2.6, 4, 1, [(0, 3), (4, 7)]),  # 2.6 frames are 3
        (3, 60, 60, 1, [(0, 3)]),
        (0, 5, 5, 1, []),
    ],
)
def test_windows_are_the_frames_nearest_to_their_seconds(
    num_frames, length, stride, rate, expected
):
    assert windows(num_frames, length=length, stride=stride, frames_per_second=rate) == expected


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(1, 40), st.floats(0.5, 4))
def test_windows_without_overlap_have_each_frame_once_but_for_rounding(num_frames, seconds, rate):
    if seconds * rate < 1:
        return
    found = windows(num_frames, length=seconds, stride=seconds, frames_per_second=rate)

    times = [sum(start <= frame < stop for start, stop in found) for frame in range(num_frames)]
    assert found[0].start == 0
    assert all(stop > start for start, stop in found)
    assert all(
        abs(start - number * seconds * rate) <= 0.5 for number, (start, _) in enumerate(found)
    )
    assert set(times) <= {0, 1, 2}
    assert times.count(1) >= num_frames - len(found)


@pytest.mark.parametrize("seconds", [0.4, 0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["length", "stride"])
def test_less_than_a_frame_is_refused(name, seconds):
    options = {"length": 5.0, "stride": 5.0} | {name: seconds}
    noun = {"length": "window"}.get(name, name)

    with pytest.raises(ValueError, match=f"a {noun} of .* s is shorter than a frame"):
        windows(9, **options, frames_per_second=1.0)
