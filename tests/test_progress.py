import io
import sys

import pytest

from ensemble_kit import progress as progress_module
from ensemble_kit.progress import progress


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self):
        return True


def work(total):
    with progress("train gru", total) as shown:
        for step in range(1, 4):
            shown.update(step, f"loss {4 - step}")


def test_elsewhere_than_on_a_terminal_the_end_is_a_plain_line_on_stderr(capsys):
    work(3)

    assert capsys.readouterr() == ("", "train gru: 3/3  loss 1\n")


def test_long_work_says_how_it_goes_on_from_time_to_time(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)

    work(0)

    assert capsys.readouterr() == (
        "",
        "train gru: 1  loss 3\ntrain gru: 2  loss 2\ntrain gru: 3  loss 1\n",
    )


@pytest.mark.parametrize("total", [3, 0])
def test_a_terminal_has_a_bar(total, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    work(total)

    assert "train gru" in terminal.getvalue()
    assert "loss 1" in terminal.getvalue()
