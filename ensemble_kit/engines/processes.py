"""One job as a process of this machine: how it is started, watched, stopped and ended.

A job's standard input is a pipe that only the process that started it holds open. When that process
ends, however it ends, the pipe closes, and the job stops as SIGTERM stops it. So no job outlives
the command that it belongs to.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TextIO

from ensemble_kit.engines.jobs import Job, JobEnd
from ensemble_kit.interrupts import INTERRUPTED, SIGNALS

LINES_KEPT = 50
SECONDS_FOR_LAST_WORDS = 5.0  # until whatever holds a dead job's stderr open is killed
SECONDS_TO_STOP = 10.0  # until a job that has lost its parent is killed
# How a command of the kit ends after one of the signals: by itself, or before it could handle them.
STOPPED = {INTERRUPTED, *(-number for number in SIGNALS)}
# `-P` keeps Python files of the current folder from being imported in place of modules.
START = (
    "-P",
    "-c",
    "from ensemble_kit.__main__ import run; "
    "from ensemble_kit.engines.processes import end_with_parent; end_with_parent(); run()",
)
# On a cluster a job whose actor has been killed goes on elsewhere at once: no time for last words.
START_ON_CLUSTER = (
    "-P",
    "-c",
    "from ensemble_kit.__main__ import run; "
    "from ensemble_kit.engines.processes import die_with_parent; die_with_parent(); run()",
)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def threads_each(at_once: int) -> int:
    """Return how many threads a job may have if ``at_once`` jobs share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // at_once)


def pass_on(job: Job, line: str) -> None:
    """Write a line that a job has printed on stderr, with the job's name before it."""
    name = "" if line.startswith(job.name) else f"{job.name}: "
    with suppress(OSError):  # if nobody reads it, the job must not wait for that
        sys.stderr.write(name + line)


def start_process(
    job: Job,
    *,
    threads: int,
    seconds_for_last_words: float = SECONDS_FOR_LAST_WORDS,
    on_line: Callable[[Job, str], None] = pass_on,
    start: Sequence[str] = START,
    folder: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> "JobProcess":
    """Start a job as a process of this machine, in its own process group.

    So Ctrl-C on a terminal reaches this process alone, which then stops the job once.

    Args:
        job: The job.
        threads: How many threads PyTorch may use in it, unless ``OMP_NUM_THREADS`` is set.
        seconds_for_last_words: How long the job's stderr may stay open after it has ended.
        on_line: Called in another thread with each line of the job's stderr.
        start: What Python is given before the job's words.
        folder: The folder that it runs in; None takes that of this process.
        environment: Variables that it has whatever this process has.
    """
    printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by `wait`
    process = subprocess.Popen(
        [sys.executable, *start, *job.words],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=printed,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={"OMP_NUM_THREADS": str(threads)} | os.environ | dict(environment),
        process_group=0,
    )
    return JobProcess(job, process, printed, seconds_for_last_words, on_line)


class JobProcess:
    """A job that runs as a process. Its lines on stderr are passed on as they come."""

    def __init__(
        self,
        job: Job,
        process: "subprocess.Popen[str]",
        printed: TextIO,
        seconds_for_last_words: float,
        on_line: Callable[[Job, str], None],
    ) -> None:
        self._on_line = on_line
        self._job = job
        self._process = process
        self._printed = printed
        self._seconds_for_last_words = seconds_for_last_words
        self._said = deque[str](maxlen=LINES_KEPT)
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def wait(self) -> JobEnd:
        """Return when the process and everything that it has started have ended."""
        code = self._process.wait()
        self._listener.join(self._seconds_for_last_words)
        if self._listener.is_alive():  # a process that the job has started holds its stderr open
            self.kill()
            self._listener.join()
        if self._process.stdin is not None:
            self._process.stdin.close()
        with self._printed as file:
            file.seek(0)
            printed = file.read()
        if code == 0:
            return JobEnd(self._job, "finished", printed)
        if code in STOPPED:
            return JobEnd(self._job, "stopped", printed)
        return JobEnd(self._job, "failed", printed, _problem(code, self._said))

    def stop(self) -> None:
        """Send what Ctrl-C sends."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End the process and everything that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._said.append(line.rstrip())
                self._on_line(self._job, line)


def _problem(code: int, said: Sequence[str]) -> str:
    """Return one line that says why a process has failed: its error, or its last line."""
    if code == -signal.SIGKILL:
        return "it was killed, as the system does when memory runs out."
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}."
    errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
    return (errors or [line for line in said if line] or [f"it ended with exit code {code}."])[-1]


def end_with_parent() -> None:
    """Let this process, which ``start_process`` has started, stop when its parent has ended."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """Let this process be killed when the thread that has started it ends, however it ends.

    And let signals reach it: the processes of a Ray actor are born with SIGINT blocked, which is
    not the same as ignored.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    end_with_parent()  # which holds on other systems too, and where the parent has ended already


def _stop_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written, so this returns when the parent's end is closed
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(SECONDS_TO_STOP)
    os.killpg(0, signal.SIGKILL)
