"""One job as a process. A shell script in Python's place shows how each kind of end is told."""

import os
import subprocess
import sys
import time

import pytest

import ensemble_kit
from ensemble_kit.engines import processes as processes_module
from ensemble_kit.engines.jobs import Job, JobEnd
from ensemble_kit.engines.processes import start_process, threads_each

PATIENCE = 20  # seconds until a test gives up on a process


@pytest.mark.parametrize(("at_once", "threads"), [(1, 7), (2, 3), (7, 1), (9, 1)])
def test_jobs_share_the_cores_there_are(at_once, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)

    assert threads_each(at_once) == threads


def test_a_job_is_a_command_of_the_kit(capfd):
    end = start_process(Job("version", ("--version",)), threads=1).wait()

    printed = f"ensemble-kit, version {ensemble_kit.__version__}\n"
    assert end == JobEnd(Job("version", ("--version",)), "finished", printed)
    assert capfd.readouterr() == ("", "")


def test_the_error_of_a_command_is_one_line_and_its_stderr_is_passed_on(capsys):
    end = start_process(Job("gru", ("evaluate", "no.csv")), threads=1).wait()

    assert (end.state, end.problem) == ("failed", "no.csv does not exist.")
    assert capsys.readouterr().err == (
        "gru: Error: no.csv does not exist.\ngru: Name a file or folder that exists.\n"
    )


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a shell script as if it were Python, with a command of the kit as its arguments."""
    processes = []

    def start(script, **options):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(processes_module.sys, "executable", str(path))
        processes.append(start_process(Job("gru", ("train", "willow/gru")), threads=3, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def test_a_job_has_its_threads_unless_the_caller_says_how_many(started, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = 'echo "$OMP_NUM_THREADS $1 $4 $5"'

    assert started(script).wait().printed == "3 -P train willow/gru\n"

    monkeypatch.setenv("OMP_NUM_THREADS", "5")

    assert started(script).wait().printed == "5 -P train willow/gru\n"


def test_lines_that_do_not_name_their_job_are_given_its_name(started, capsys):
    started("echo 'gru: 3/9' >&2; echo 'measure: 1/2' >&2").wait()

    assert capsys.readouterr().err == "gru: 3/9\ngru: measure: 1/2\n"


def test_nobody_listening_does_not_keep_a_job_from_its_end(started, monkeypatch):
    class Closed:
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(processes_module.sys, "stderr", Closed())

    end = started("yes 'a line that fills the pipe' | head -n 9999 >&2; echo done").wait()

    assert (end.state, end.printed) == ("finished", "done\n")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'Traceback ...' >&2; echo 'ValueError: wrong' >&2; echo >&2; exit 1",
         "ValueError: wrong"),
        ("echo 'Error: first' >&2; echo 'Error: last' >&2; echo hint >&2; exit 1", "last"),
        ("exit 7", "it ended with exit code 7."),
        ("kill -KILL $$", "it was killed, as the system does when memory runs out."),
        ("kill -SEGV $$", "it was ended by SIGSEGV."),
    ],
)  # fmt: skip
def test_why_a_job_failed_is_one_line(script, problem, started):
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


def test_what_a_job_has_started_ends_with_it(started, tmp_path):
    script = f"sleep 1000 & echo $! > {tmp_path / 'pid'}; kill -KILL $$"
    job = started(script, seconds_for_last_words=0.1)

    assert job.wait().state == "failed"

    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(pid))


PARENT = """
import sys, time
from ensemble_kit.engines.jobs import Job
from ensemble_kit.engines.processes import start_process

job = start_process(Job("long", ("--version",)), threads=1)
print(job._process.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("handles", [True, False])
def test_a_job_ends_when_its_parent_is_killed(handles, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "if '-c' in sys.orig_argv and 'end_with_parent' in ' '.join(sys.orig_argv):\n"
        "    import ensemble_kit.__main__ as kit, signal, time\n"
        f"    if not {handles}: kit_signals = signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    kit.run = lambda: time.sleep(1000)\n"
        "    import ensemble_kit.engines.processes as processes\n"
        "    processes.SECONDS_TO_STOP = 0.1\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        assert is_running(pid)

        parent.kill()

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
