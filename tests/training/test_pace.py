import pytest

from ensemble_kit.training import pace as pace_module
from ensemble_kit.training.pace import Pace


@pytest.fixture
def sleep(monkeypatch):
    """A function that lets the time go on, which nothing else does."""
    now = [100.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_waiting_is_a_share_of_the_time_since_the_last_line_without_what_was_put_aside(sleep):
    pace = Pace(100)
    assert pace.figures(100) == {"examples_per_second": 0, "data_wait": 0}
    for seconds_waited in (2, 1):
        with pace.waiting():
            sleep(seconds_waited)
        sleep(3)
    with pace.aside():
        sleep(50)

    first = pace.figures(132)
    pace.restart(132)
    with pace.waiting():
        sleep(1)
    sleep(1)

    assert first == {"examples_per_second": 3.6, "data_wait": 0.3333}  # 32 in 9 s, 3 of them idle
    assert pace.figures(137) == {"examples_per_second": 2.5, "data_wait": 0.5}
