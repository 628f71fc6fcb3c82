"""Signals that ask a process to end: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, all handled alike.

SIGTERM is what a scheduler, a container or `kill` sends, SIGHUP what a closed terminal sends, and
SIGUSR1 what SLURM is told to send some time before a job's limit. Python ends at once on all of
them, so nothing would be written and no file cleaned up. Within ``signals_interrupt`` they raise
what Ctrl-C raises; before a command has begun and after its end, ``signals_end`` lets them end the
process without a word. Whichever it was, the exit code is 130: a script that gives the same command
again need know no other.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from ensemble_kit.errors import InputError

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
INTERRUPTED = 130  # the exit code: 128 + SIGINT, as shells report Ctrl-C
# How the code of a child begins that is no command: SIGINT ends it without a traceback, and the
# process that has started it says so.
QUIET_START = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
Handler = Callable[[int, FrameType | None], None]


def signals_end() -> None:
    """Let Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end this process at once, without a traceback.

    For good: while Python ends, an exception would be printed from whatever runs then.
    """
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _end)


def _end(*_: object) -> NoReturn:
    with suppress(Exception):  # a full disk, a closed pipe, or the moment in which they are written
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)


@contextmanager
def signals_interrupt(*expected: type[Exception]) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 raise ``KeyboardInterrupt`` in the block.

    While a module is imported they end the process at once instead, without a traceback: an
    exception in the middle of an import may be turned into another one by an extension module, and
    nothing that is worth keeping has begun. Elsewhere too: an error that follows a signal is taken
    for what a library has made of it, unless it is one of those ``expected``.
    """
    is_interrupted = False

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal is_interrupted
        if _is_importing(frame):
            _end()
        is_interrupted = True
        raise KeyboardInterrupt

    with handled(interrupt):
        try:
            yield
        except Exception as error:
            if not is_interrupted or isinstance(error, expected):
                raise
            raise KeyboardInterrupt from error


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let the signals wait until the block has ended: half a step could not be resumed."""
    waiting: list[int] = []
    with handled(lambda number, _: waiting.append(number)):
        yield
    if waiting:
        signal.raise_signal(waiting[0])


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Give the signals a handler for a block.

    Signals that were ignored, as ``nohup`` does with SIGHUP, stay ignored. Only the main thread may
    handle signals, so in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def require_process_groups(option: str) -> None:
    """Raise ``InputError`` where the system has no groups of processes, as Windows has none.

    What an option starts would outlive the command, and could not be stopped with it.
    """
    if not hasattr(os, "killpg"):
        raise InputError(
            f"{option} starts processes that this system, as Windows, cannot end together.",
            hint=f"Leave {option} out, or run the command in WSL.",
        )
