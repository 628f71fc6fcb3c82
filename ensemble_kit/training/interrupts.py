"""Ctrl-C at moments where nothing is half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended: half a step could not be taken up again."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, and only there can they be handled
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)
