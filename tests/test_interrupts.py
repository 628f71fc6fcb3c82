"""Signals that ask a process to end, in real processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ensemble_kit._version import __version__
from ensemble_kit.errors import InputError
from ensemble_kit.interrupts import (
    interrupts_wait,
    require_process_groups,
    signals_interrupt,
)

PATIENCE = 60
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_raises_what_ctrl_c_raises(number):
    before = signal.getsignal(number)

    with signals_interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)

    assert signal.getsignal(number) == before


def test_another_error_that_a_library_makes_of_a_signal_is_one_too():
    def library():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        library()
    with pytest.raises(ValueError, match="the shape"), signals_interrupt(ValueError):
        library()


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(ValueError, match="bad"), signals_interrupt():
        raise ValueError("bad")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_the_block_has_ended(number):
    reached = []

    def work():
        with interrupts_wait():
            signal.raise_signal(number)
            reached.append("the end of the block")
        reached.append("what follows it")

    with signals_interrupt(), pytest.raises(KeyboardInterrupt):
        work()

    assert reached == ["the end of the block"]


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt(), interrupts_wait():
            signal.raise_signal(signal.SIGHUP)
            handler = signal.getsignal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)

    assert handler == signal.SIG_IGN


def test_in_another_thread_nothing_is_handled():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with signals_interrupt(), interrupts_wait():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [before]


@pytest.mark.parametrize(
    ("module", "number"),
    [
        *(("torch", number) for number in SIGNALS),
        ("click", signal.SIGINT),
        ("ensemble_kit.training.loop", signal.SIGTERM),  # later: PyTorch has been loaded
    ],
)
def test_a_signal_while_modules_load_ends_the_command_without_a_traceback(module, number, tmp_path):
    # a finder that stands still at the module, as a slow disk would
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            print('loading', flush=True)\n"
        "            time.sleep(1000)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    words = ["train", "demo/gru", "--train", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "ensemble_kit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    ) as process:
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.1)

        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=PATIENCE)

    assert (process.returncode, stdout, stderr) == (130, "", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_python_ends_is_no_traceback_either(number, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, signal\n"
        f"atexit.register(signal.raise_signal, signal.Signals({int(number)}))\n"
    )

    result = subprocess.run(
        [sys.executable, "-m", "ensemble_kit", "--version"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )

    version = f"ensemble-kit, version {__version__}\n"
    assert (result.returncode, result.stdout, result.stderr) == (130, version, "")


def test_a_system_without_groups_of_processes_is_said_to_be_one(monkeypatch):
    require_process_groups("--jobs")
    monkeypatch.delattr(os, "killpg")

    with pytest.raises(InputError) as caught:
        require_process_groups("--jobs")

    assert str(caught.value) == (
        "--jobs starts processes that this system, as Windows, cannot end together.\n"
        "Leave --jobs out, or run the command in WSL."
    )
