"""Commands of the kit side by side, each by itself: one that fails does not stop the rest.

Three things know nothing of each other: what a job is (``Job``), what runs one (``start_process``:
a process of this machine; a cluster's task would be another ``Start``), and what runs many
(``run_jobs``: how many at once, what follows an interrupt).
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, Protocol, TextIO

from ensemble_kit.errors import TrainingError

INTERRUPTED = 130  # the exit code of a command of the kit that Ctrl-C has ended
LINES_KEPT = 50
SECONDS_FOR_LAST_WORDS = 5.0


@dataclass(frozen=True)
class Job:
    """A command to be run.

    Attributes:
        name: What it is called in what people read.
        words: The command line behind ``ensemble-kit``.
    """

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class JobEnd:
    """How a job has ended.

    Attributes:
        job: The job.
        state: ``stopped`` if it was interrupted, or not begun because of an interrupt.
        printed: What it printed on standard output.
        problem: Why it failed, in one line; empty if it did not.
    """

    job: Job
    state: Literal["finished", "stopped", "failed"]
    printed: str = ""
    problem: str = ""


class RunningJob(Protocol):
    """A job that has been started."""

    def wait(self) -> JobEnd:
        """Return when it has ended. Called once, in a thread of its own."""

    def stop(self) -> None:
        """Ask it to end in its own way, if it has not ended yet."""

    def kill(self) -> None:
        """End it and all that it has started."""


Start = Callable[[Job], RunningJob]


def run_jobs(
    jobs: Sequence[Job], start: Start, *, at_once: int, on_end: Callable[[JobEnd], None]
) -> list[JobEnd]:
    """Run jobs to their ends, however each of them ends.

    Ctrl-C, SIGTERM and SIGHUP ask the running jobs to stop, and no other is begun; the second one
    kills them. (In the main thread; elsewhere signals cannot be handled.)

    Args:
        jobs: In the order in which they are begun.
        start: What starts one.
        at_once: How many may run at a time.
        on_end: Called, in this thread, as soon as a job has ended.

    Returns:
        An end for each job, in the order of the jobs.
    """
    waiting, running = deque(jobs), dict[Job, RunningJob]()
    ends: dict[Job, JobEnd] = {}
    events = SimpleQueue[JobEnd | None]()  # None is an interrupt; a handler may put into this kind
    is_stopped = False
    with _interrupts(lambda: events.put(None)):
        try:
            while running or waiting:
                while waiting and len(running) < at_once:
                    job = waiting.popleft()
                    running[job] = start(job)
                    threading.Thread(target=_wait, args=(running[job], events.put)).start()
                event = events.get()
                if event is None:
                    waiting.clear()
                    for one in running.values():
                        one.kill() if is_stopped else one.stop()
                    is_stopped = True
                else:
                    del running[event.job]
                    ends[event.job] = event
                    on_end(event)
        finally:
            for one in running.values():  # none, unless `start` or `on_end` has raised
                one.stop()
    return [ends.get(job) or JobEnd(job, "stopped") for job in jobs]


def require_finished(ends: Sequence[JobEnd]) -> None:
    """Raise ``TrainingError`` if a job has failed, with the reason of each that has."""
    failed = [end for end in ends if end.state == "failed"]
    if failed:
        reasons = "".join(f"\n  {end.job.name}: {end.problem}" for end in failed)
        raise TrainingError(
            f"{len(failed)} of {len(ends)} jobs failed:{reasons}",
            hint="Mend that and give the same command again; what has finished is left as it is.",
        )


def threads_each(at_once: int) -> int:
    """Return how many threads a job may have where ``at_once`` of them share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // at_once)


def start_process(job: Job, *, threads: int) -> "JobProcess":
    """Start a job as a process of this machine, in a process group of its own.

    So Ctrl-C on a terminal reaches this process alone, which then stops the job once.

    Args:
        job: The job.
        threads: How many threads PyTorch may use in it, unless ``OMP_NUM_THREADS`` is set.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"} | os.environ
    printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by `wait`
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ensemble_kit", *job.words],
        stdin=subprocess.DEVNULL,
        stdout=printed,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        process_group=0,
    )
    return JobProcess(job, process, printed)


class JobProcess:
    """A job that runs as a process. What it says on stderr is passed on, line by line."""

    def __init__(self, job: Job, process: "subprocess.Popen[str]", printed: TextIO) -> None:
        self._job = job
        self._process = process
        self._printed = printed
        self._said = deque[str](maxlen=LINES_KEPT)
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def wait(self) -> JobEnd:
        """Return when the process has ended, and nothing that it has started is left."""
        code = self._process.wait()
        self._listener.join(SECONDS_FOR_LAST_WORDS)
        if self._listener.is_alive():  # something that it has started holds its stderr open
            self.kill()
            self._listener.join()
        with self._printed as file:
            file.seek(0)
            printed = file.read()
        if code == 0:
            return JobEnd(self._job, "finished", printed)
        if code in (INTERRUPTED, -signal.SIGINT):
            return JobEnd(self._job, "stopped", printed)
        return JobEnd(self._job, "failed", printed, _problem(code, self._said))

    def stop(self) -> None:
        """Do as Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._said.append(line.rstrip())
                name = "" if line.startswith(self._job.name) else f"{self._job.name}: "
                with suppress(OSError):  # nobody reads it; the process must not wait for that
                    sys.stderr.write(name + line)


def _wait(running: RunningJob, tell: Callable[[JobEnd], None]) -> None:
    tell(running.wait())


def _problem(code: int, said: Sequence[str]) -> str:
    """Return one line that says why a process has failed: its error, or the last it said."""
    if code == -signal.SIGKILL:
        return "it was killed, as the system does where memory runs out."
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}."
    errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
    return (errors or [line for line in said if line] or [f"it ended with exit code {code}."])[-1]


@contextmanager
def _interrupts(note: Callable[[], None]) -> Iterator[None]:
    """Call ``note`` at each signal that asks this process to end, in place of ending it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGINT also where it is ignored, as in a shell's background: jobs would inherit that, and it
    # is what stops them
    before = {
        number: signal.signal(number, lambda *_: note())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
