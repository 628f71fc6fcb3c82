"""Jobs side by side. Made-up jobs show how many are run; a script in Python's place, how one is."""

import os
import signal
import threading
import time

import pytest

import ensemble_kit
from ensemble_kit.engines import jobs as jobs_module
from ensemble_kit.engines.jobs import (
    Job,
    JobEnd,
    require_finished,
    run_jobs,
    start_process,
    threads_each,
)
from ensemble_kit.errors import TrainingError

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


def test_a_fault_of_the_caller_leaves_no_job_unasked_to_stop():
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

    with pytest.raises(TrainingError) as caught:
        require_finished(
            [
                JobEnd(JOBS[0], "failed", problem="the loss is nan."),
                JobEnd(JOBS[1], "finished"),
                JobEnd(JOBS[2], "failed", problem="the disk is full."),
            ]
        )

    assert str(caught.value) == (
        "2 of 3 jobs failed:\n  job-0: the loss is nan.\n  job-2: the disk is full.\n"
        "Mend that and give the same command again; what has finished is left as it is."
    )


@pytest.mark.parametrize(("at_once", "threads"), [(1, 7), (2, 3), (7, 1), (9, 1)])
def test_jobs_share_the_cores_there_are(at_once, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)

    assert threads_each(at_once) == threads


def test_a_job_is_a_command_of_the_kit(capfd):
    end = start_process(Job("version", ("--version",)), threads=1).wait()

    printed = f"ensemble-kit, version {ensemble_kit.__version__}\n"
    assert end == JobEnd(Job("version", ("--version",)), "finished", printed)
    assert capfd.readouterr() == ("", "")


def test_the_fault_of_a_command_is_one_line_and_its_stderr_is_passed_on(capsys):
    end = start_process(Job("gru", ("evaluate", "no.csv")), threads=1).wait()

    assert (end.state, end.problem) == ("failed", "no.csv does not exist.")
    assert capsys.readouterr().err == (
        "gru: Error: no.csv does not exist.\ngru: Name a file that exists.\n"
    )


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a shell script as if it were Python, with a command of the kit as its arguments."""
    processes = []

    def start(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(jobs_module.sys, "executable", str(path))
        processes.append(start_process(Job("gru", ("train", "willow/gru")), threads=3))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def test_a_job_has_its_threads_unless_the_caller_says_how_many(started, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = 'echo "$OMP_NUM_THREADS $OMP_WAIT_POLICY: $*"'
    command = "-P -m ensemble_kit train willow/gru\n"

    assert started(script).wait().printed == f"3 passive: {command}"

    monkeypatch.setenv("OMP_NUM_THREADS", "5")

    assert started(script).wait().printed == f"5 passive: {command}"


def test_lines_that_do_not_name_their_job_are_given_its_name(started, capsys):
    started("echo 'gru: 3/9' >&2; echo 'measure: 1/2' >&2").wait()

    assert capsys.readouterr().err == "gru: 3/9\ngru: measure: 1/2\n"


def test_nobody_listening_does_not_keep_a_job_from_its_end(started, monkeypatch):
    class Closed:
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(jobs_module.sys, "stderr", Closed())

    end = started("yes 'a line that fills the pipe' | head -n 9999 >&2; echo done").wait()

    assert (end.state, end.printed) == ("finished", "done\n")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'Traceback ...' >&2; echo 'ValueError: wrong' >&2; echo >&2; exit 1",
         "ValueError: wrong"),
        ("echo 'Error: first' >&2; echo 'Error: last' >&2; echo hint >&2; exit 1", "last"),
        ("exit 7", "it ended with exit code 7."),
        ("kill -KILL $$", "it was killed, as the system does where memory runs out."),
        ("kill -SEGV $$", "it was ended by SIGSEGV."),
    ],
)  # fmt: skip
def test_a_fault_is_told_in_one_line(script, problem, started):
    assert started(script).wait() == JobEnd(
        Job("gru", ("train", "willow/gru")), "failed", problem=problem
    )


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("trap 'exit 130' INT", "stopped"),
        ("trap 'exit 0' INT", "finished"),
        ("trap 'exit 1' INT", "failed"),
        ("", "stopped"),
    ],
)
def test_a_job_that_is_asked_to_stop_ends_in_its_own_way(script, state, started, capsys):
    job = started(f"{script}\necho ready >&2\nwhile :; do sleep 0.01; done")
    wait_until(lambda: "ready" in capsys.readouterr().err)

    job.stop()

    assert job.wait().state == state
    job.stop()  # and nothing happens


def test_what_a_job_has_started_ends_with_it(started, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "SECONDS_FOR_LAST_WORDS", 0.1)
    job = started(f"sleep 1000 & echo $! > {tmp_path / 'pid'}; kill -KILL $$")

    assert job.wait().state == "failed"

    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(pid))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(is_so):
    until = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)
