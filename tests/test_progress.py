import io
import sys

import pytest

from ensemble_kit import progress as progress_module
from ensemble_kit.progress import progress, quietly


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self):
        return True


def terminal_of(monkeypatch):
    """Make stderr a terminal; not a fixture, since pytest takes stderr when a test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    time = type("Time", (), {"now": 0.0, "monotonic": lambda self: self.now})()
    monkeypatch.setattr(progress_module, "time", time)
    return time


def work(total, **options):
    with progress("train gru", total, **options) as shown:
        for step in range(1, 4):
            shown.update(step, f"loss {4 - step}")


def test_elsewhere_than_on_a_terminal_the_end_is_a_plain_line_on_stderr(capsys):
    work(3)

    assert capsys.readouterr() == ("", "train gru: 3/3  loss 1\n")


def test_long_work_says_how_it_goes_on_from_time_to_time(capsys):
    work(0, seconds_between=0.0)

    assert capsys.readouterr() == (
        "",
        "train gru: 1  loss 3\ntrain gru: 2  loss 2\ntrain gru: 3  loss 1\n",
    )


def test_values_are_written_each_in_its_way_and_place_and_none_is_left_out(capsys):
    with progress("gru", 2) as shown:
        shown.update(
            2, "so far", examples_per_second=1234.5, gap=None, learning_rate=1.6e-4, loss=2.34567
        )
        shown.update(2, gap=0.56789, data_wait=0.126)

    assert capsys.readouterr().err == (
        "gru: 2/2  loss 2.346  rate 0.00016  1,234 examples/s  so far\n"
        "gru: 2/2  GAP 0.5679  13% waiting for data\n"
    )


def test_the_time_that_is_left_does_not_count_what_was_done_before(capsys, clock):
    with progress("gru", 100, done=50) as shown:
        for done, now in ((50, 60.0), (60, 80.0), (75, 100.0), (100, 130.0)):
            clock.now = now
            shown.update(done, "...")

    assert capsys.readouterr().err.splitlines() == [
        "gru: 50/100  ...",
        "gru: 60/100  ...  0:05:20 left",
        "gru: 75/100  ...  0:01:40 left",
        "gru: 100/100  ...",
    ]


@pytest.mark.parametrize("total", [3, 0])
def test_a_terminal_has_a_bar(total, monkeypatch):
    terminal = terminal_of(monkeypatch)

    work(total)

    assert "train gru" in terminal.getvalue()
    assert "loss 1" in terminal.getvalue()


def test_a_bar_begins_with_what_was_done_before_and_shows_values(monkeypatch):
    terminal = terminal_of(monkeypatch)

    with progress("gru", 9, done=4) as shown:
        shown.update(5, loss=2.5, gap=0.25)

    assert "4/9" in terminal.getvalue()
    assert "loss 2.500  GAP 0.2500" in terminal.getvalue()


def test_quiet_work_shows_nothing_until_it_is_over(capsys, monkeypatch):
    with quietly():
        work(3)
        assert capsys.readouterr() == ("", "")
        with monkeypatch.context() as patched:
            terminal = terminal_of(patched)
            work(3)
            assert terminal.getvalue() == ""

    work(3)

    assert capsys.readouterr().err == "train gru: 3/3  loss 1\n"
