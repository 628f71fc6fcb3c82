"""Many jobs side by side: their order, what stops them, and the summary of their ends.

A job that fails does not stop the others. What starts a job and watches it is another module, a
``Start``: ``processes`` starts jobs as processes of this machine.
"""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, Protocol

from ensemble_kit.errors import JobError
from ensemble_kit.interrupts import SIGNALS
from ensemble_kit.wording import counted


@dataclass(frozen=True)
class Job:
    """A command of the kit.

    Attributes:
        name: The job's name in what people read.
        words: The words of the command line after ``ensemble-kit``.
    """

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class JobEnd:
    """How a job has ended.

    Attributes:
        job: The job.
        state: ``stopped`` if it was interrupted, or not started because of an interrupt.
        printed: What it printed on standard output.
        problem: Why it failed, in one line; empty if it did not.
        node: The machine of a cluster that it ran on; empty for a process of this machine.
    """

    job: Job
    state: Literal["finished", "stopped", "failed"]
    printed: str = ""
    problem: str = ""
    node: str = ""


class RunningJob(Protocol):
    """A job that has been started."""

    def wait(self) -> JobEnd:
        """Return when the job has ended. Called once, in a thread that does nothing else."""

    def stop(self) -> None:
        """Ask the job to save its work and end, if it has not ended yet."""

    def kill(self) -> None:
        """End the job and everything that it has started."""


Start = Callable[[Job], RunningJob]


def run_jobs(
    jobs: Sequence[Job],
    start: Start,
    *,
    at_once: int,
    on_end: Callable[[JobEnd], None],
) -> list[JobEnd]:
    """Run jobs, and return when all of them have ended.

    Ctrl-C, SIGTERM or SIGHUP asks the running jobs to stop, and no other job is started; a second
    signal kills them. (Only in the main thread: signals cannot be handled in another one.)

    Args:
        jobs: The jobs, in the order in which they are started.
        start: Starts a job.
        at_once: How many may run at a time.
        on_end: Called in this thread whenever a job has ended.

    Returns:
        The end of each job, in the order of the jobs.
    """
    waiting, running = deque(jobs), dict[Job, RunningJob]()
    ends: dict[Job, JobEnd] = {}
    # An int is a signal. Of the queues only this kind may be filled by a signal handler.
    events = SimpleQueue[JobEnd | int]()
    is_stopped = False
    with _signals_noted(events.put):
        try:
            while running or waiting:
                while waiting and len(running) < at_once:
                    job = waiting.popleft()
                    running[job] = start(job)
                    threading.Thread(target=_wait, args=(running[job], events.put)).start()
                event = events.get()
                if isinstance(event, int):
                    waiting.clear()
                    for started in running.values():
                        started.kill() if is_stopped else started.stop()
                    is_stopped = True
                else:
                    del running[event.job]
                    ends[event.job] = event
                    on_end(event)
        finally:
            for started in running.values():  # none, unless `start` or `on_end` has raised
                started.stop()
    return [ends.get(job) or JobEnd(job, "stopped") for job in jobs]


def require_finished(ends: Sequence[JobEnd]) -> None:
    """Raise ``JobError`` if a job has failed, with the reason of each one."""
    failed = [end for end in ends if end.state == "failed"]
    if failed:
        reasons = "".join(f"\n  {end.job.name}: {end.problem}" for end in failed)
        raise JobError(
            f"{len(failed)} of {counted(len(ends), 'job')} failed:{reasons}",
            hint="Fix this and give the same command again; what is finished is left as it is.",
        )


def _wait(running: RunningJob, tell: Callable[[JobEnd], None]) -> None:
    tell(running.wait())


@contextmanager
def _signals_noted(note: Callable[[int], None]) -> Iterator[None]:
    """Call ``note`` for each signal that asks this process to end, instead of ending it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGINT is handled even where it is ignored, as in the background of a shell script: jobs would
    # inherit that, and SIGINT is what stops them.
    before = {
        number: signal.signal(number, lambda number, _: note(number))
        for number in SIGNALS
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
