"""Jobs side by side, with made-up jobs in place of processes."""

import signal
import threading

import pytest

from ensemble_kit.engines.jobs import Job, JobEnd, require_finished, run_jobs
from ensemble_kit.errors import JobError

PATIENCE = 20  # seconds until a test gives up on a thread or a process
JOBS = [Job(f"job-{number}", ()) for number in range(5)]


class MadeUp:
    """A job that ends when it is told to, in the way it is told to."""

    def __init__(self, job):
        self.job = job
        self.is_over = threading.Event()
        self.state = None
        self.asked = []

    def wait(self):
        assert self.is_over.wait(PATIENCE)
        return JobEnd(self.job, self.state)

    def stop(self):
        self.asked.append("stop")

    def kill(self):
        self.asked.append("kill")

    def end(self, state):
        self.state = state
        self.is_over.set()


class MadeUpJobs(list):
    """All jobs that were begun; ``when`` says what happens once so many were."""

    def __init__(self, when):
        self.when = when

    def __call__(self, job):
        self.append(MadeUp(job))
        self.when.get(len(self), lambda: None)()
        return self[-1]


def test_all_jobs_are_run_so_many_at_a_time_whatever_becomes_of_one():
    begun = MadeUpJobs(
        {
            2: lambda: begun[1].end("failed"),
            3: lambda: begun[0].end("finished"),
            4: lambda: begun[3].end("finished"),
            5: lambda: begun[2].end("finished"),
        }
    )
    ended = []  # and how many had begun then

    def on_end(end):
        ended.append((end.job, len(begun)))
        if len(ended) == 4:
            begun[4].end("finished")

    ends = run_jobs(JOBS, begun, at_once=2, on_end=on_end)

    assert ended == list(zip([JOBS[n] for n in (1, 0, 3, 2, 4)], (2, 3, 4, 5, 5), strict=True))
    states = ["finished", "failed", "finished", "finished", "finished"]
    assert ends == [JobEnd(job, state) for job, state in zip(JOBS, states, strict=True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_stops_what_runs_and_begins_no_more(number):
    def stop():
        self = begun[1]
        self.stop = lambda: self.end("stopped")
        begun[0].stop = lambda: begun[0].end("finished")  # it ended by itself at that moment
        signal.raise_signal(number)

    begun = MadeUpJobs({2: stop})
    before = signal.getsignal(number)

    ends = run_jobs(JOBS, begun, at_once=2, on_end=lambda _: None)

    assert len(begun) == 2
    assert [end.state for end in ends] == ["finished", *["stopped"] * 4]
    assert signal.getsignal(number) == before


def test_a_second_interrupt_kills():
    def interrupt_twice():
        begun[1].stop = lambda: (begun[1].asked.append("stop"), signal.raise_signal(signal.SIGINT))
        for one in begun:
            one.kill = lambda one=one: (one.asked.append("kill"), one.end("failed"))
        signal.raise_signal(signal.SIGINT)

    begun = MadeUpJobs({2: interrupt_twice})

    ends = run_jobs(JOBS[:3], begun, at_once=2, on_end=lambda _: None)

    assert [one.asked for one in begun] == [["stop", "kill"]] * 2
    assert [end.state for end in ends] == ["failed", "failed", "stopped"]


def test_an_error_of_the_caller_leaves_no_job_unasked_to_stop():
    begun = MadeUpJobs({2: lambda: begun[0].end("finished")})

    def on_end(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_jobs(JOBS, begun, at_once=2, on_end=on_end)

    assert [one.asked for one in begun] == [[], ["stop"]]
    begun[1].end("stopped")


def test_in_another_thread_jobs_are_run_too():
    begun = MadeUpJobs({1: lambda: begun[0].end("finished")})
    ends = []

    thread = threading.Thread(
        target=lambda: ends.extend(run_jobs(JOBS[:1], begun, at_once=2, on_end=lambda _: None))
    )
    thread.start()
    thread.join(PATIENCE)

    assert ends == [JobEnd(JOBS[0], "finished")]


def test_the_summary_names_each_job_that_failed_and_why():
    require_finished([JobEnd(JOBS[0], "finished"), JobEnd(JOBS[1], "stopped")])

    with pytest.raises(JobError) as caught:
        require_finished(
            [
                JobEnd(JOBS[0], "failed", problem="the loss is nan."),
                JobEnd(JOBS[1], "finished"),
                JobEnd(JOBS[2], "failed", problem="the disk is full."),
            ]
        )

    assert str(caught.value) == (
        "2 of 3 jobs failed:\n  job-0: the loss is nan.\n  job-2: the disk is full.\n"
        "Fix this and give the same command again; what is finished is left as it is."
    )
