"""What every engine must do, over processes of this machine and over a Ray cluster alike."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from ray_cluster import Cluster, cluster, descendants, variables_of  # noqa: F401 - a fixture
from workspace_fixture import TRAINING

from ensemble_kit.engines.jobs import Job, run_jobs
from ensemble_kit.engines.processes import start_process
from ensemble_kit.errors import JobError
from ensemble_kit.store.workspace import RunFolder

PATIENCE = 200  # seconds until a job has imported PyTorch and trained some steps
ENDLESS = ("--set", "training.max_steps=10_000_000", "-o", "elsewhere")


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.ray)])
def start(request, own_workspace):
    """What starts a job, and the workspace as the current folder."""
    if request.param == "processes":
        yield partial(start_process, threads=1)
        return
    with connected(request.getfixturevalue("cluster"), own_workspace.path) as start:
        yield start


def connected(cluster, folder, **asks):  # noqa: F811 - the fixture's value
    from ensemble_kit.engines.ray import ray_cluster

    asks = {"cpus_each": 1, "gpus_each": 0} | asks
    return ray_cluster(cluster.address, folders=[folder / "elsewhere"], **asks)


def training(name):
    return Job(name, ("train", *TRAINING[:2], *ENDLESS, "--", f"recipes/{name}.toml"))


def when(is_so, then):
    """Call ``then`` in another thread once something is so."""

    def watch():
        until = time.monotonic() + PATIENCE
        while not is_so():
            assert time.monotonic() < until
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def have_checkpoints(folder, *names):
    return lambda: all(list((folder / name).glob("checkpoints/step-*")) for name in names)


def test_jobs_finish_and_fail_and_their_ends_are_in_the_order_of_the_jobs(start, capfd):
    jobs = [Job("bad", ("evaluate", "no.csv")), Job("one", ("--version",)), Job("two", ("--help",))]
    seen = []

    # the cluster has two CPUs, so one of the jobs waits in its queue
    ends = run_jobs(jobs, start, at_once=3, on_end=seen.append)

    assert [end.job for end in ends] == jobs
    assert [end.state for end in ends] == ["failed", "finished", "finished"]
    assert ends[0].problem == "no.csv does not exist."
    assert ends[1].printed.startswith("ensemble-kit, version ")
    assert sorted(seen, key=ends.index) == ends
    assert "bad: Error: no.csv does not exist.\n" in capfd.readouterr().err


def test_an_interrupt_stops_what_runs_with_its_work_saved_and_starts_no_more(start, own_workspace):
    runs = own_workspace.path / "elsewhere"
    thread = when(have_checkpoints(runs, "mean"), lambda: os.kill(os.getpid(), signal.SIGINT))

    ends = run_jobs([training("mean"), training("bag")], start, at_once=1, on_end=lambda _: None)

    thread.join()
    assert [end.state for end in ends] == ["stopped", "stopped"]
    last = json.loads((runs / "mean" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["state"] == "stopped"
    assert (runs / "mean" / "checkpoints" / f"step-{last['step']:08d}.safetensors").exists()
    assert not (runs / "bag").exists()


def test_a_second_interrupt_kills(start, own_workspace):
    runs = own_workspace.path / "elsewhere"

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # or the system would make one signal of both
        os.kill(os.getpid(), signal.SIGINT)

    thread = when(have_checkpoints(runs, "mean"), twice)

    (end,) = run_jobs([training("mean")], start, at_once=1, on_end=lambda _: None)

    thread.join()
    assert end.state in {"failed", "stopped"}  # it may be faster than the second signal
    assert end.problem in {"", "it was killed, as the system does when memory runs out."}
    with RunFolder(runs / "mean").locked():  # nobody trains it any more
        pass


@pytest.mark.ray
def test_a_job_dies_with_its_actor_at_once_and_goes_on_elsewhere(
    cluster,  # noqa: F811
    own_workspace,
    capfd,
):
    runs = own_workspace.path / "elsewhere"
    killed, old, sizes = [], [], []

    def kill_the_actor():
        ((actor, job),) = cluster.jobs()
        assert variables_of(job)["OMP_NUM_THREADS"] == "1"
        os.kill(actor, signal.SIGKILL)
        until = time.monotonic() + 5
        while os.path.exists(f"/proc/{job}/exe") and time.monotonic() < until:
            time.sleep(0.01)
        is_gone = not os.path.exists(f"/proc/{job}/exe")
        # killed by the system, not stopped as a job is whose standard input has closed
        killed.append(is_gone and "stopped" not in (runs / "mean" / "metrics.jsonl").read_text())
        old.append(job)
        sizes.append((runs / "mean" / "metrics.jsonl").stat().st_size)
        when(is_training_again, lambda: os.kill(os.getpid(), signal.SIGINT))

    def is_training_again():
        others = [pid for _, pid in cluster.jobs() if pid not in old]
        return others and (runs / "mean" / "metrics.jsonl").stat().st_size > sizes[0]

    thread = when(have_checkpoints(runs, "mean"), kill_the_actor)
    with connected(cluster, own_workspace.path) as start:
        (end,) = run_jobs([training("mean")], start, at_once=1, on_end=lambda _: None)

    thread.join()
    assert killed == [True]
    assert end.state == "stopped"
    assert " is lost; starting again" in capfd.readouterr().err


@pytest.mark.ray
def test_what_no_machine_has_is_refused_at_once(cluster, own_workspace):  # noqa: F811
    with (
        pytest.raises(JobError) as caught,
        connected(cluster, own_workspace.path, cpus_each=3, gpus_each=0.5),
    ):
        pytest.fail("nothing could ever be started")

    assert str(caught.value) == (
        "A job asks for 3 CPUs and 0.5 GPUs; of the 2 machines none has them: at most 1 CPUs and "
        "0 GPUs.\nAsk for less with --cpus-each and --gpus-each, or add a machine."
    )


def other_command(cluster, folder, **environment):  # noqa: F811 - the fixture's value
    words = ["-m", "ensemble_kit", "train", "recipes/mean.toml", *TRAINING[:2], *ENDLESS]
    return subprocess.run(
        [sys.executable, *words, "--on", cluster.address],
        cwd=folder,
        env=os.environ | cluster.environment | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


FIRST, SECOND = "a" * 56, "b" * 56  # as Ray writes the ids of machines


class Machines:
    """Stands for Ray where each machine has its own disk."""

    def __init__(self, disks):
        self.disks = disks

    def remote(self, *, num_cpus, scheduling_strategy):
        disk = self.disks[scheduling_strategy.node_id]
        return lambda function: SimpleNamespace(remote=lambda _, name: function(str(disk), name))

    def get(self, answers):
        return answers


@pytest.mark.ray
def test_a_folder_that_another_machine_does_not_see_is_refused(tmp_path):
    from ensemble_kit.engines.ray import _require_shared

    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder, disks in (
        (shared, {FIRST: shared, SECOND: other}),
        (other, {FIRST: shared, SECOND: shared}),  # this machine sees another disk
    ):
        with pytest.raises(JobError) as caught:
            _require_shared(Machines(disks), folder, list(disks))
        assert str(caught.value) == (
            f"{folder} is not shared: a file that one machine of the cluster writes there is not "
            "seen by another.\n"
            "Put the workspace on a disk that every machine mounts at the same path."
        )
    _require_shared(Machines({FIRST: shared, SECOND: shared}), shared, [FIRST, SECOND])


@pytest.mark.ray
def test_strangers_are_refused(cluster, own_workspace):  # noqa: F811
    result = other_command(cluster, own_workspace.path, RAY_AUTH_TOKEN="f" * 32)

    assert result.returncode == 1
    assert f"Error: There is no Ray cluster at {cluster.address} that lets us in" in result.stderr


@pytest.mark.ray
@pytest.mark.parametrize(
    "address", ["address", pytest.param("client", marks=pytest.mark.exhaustive)]
)
def test_predictions_are_the_same_bytes_on_a_cluster(cluster, own_workspace, address):  # noqa: F811
    model = own_workspace.averaged("mean")
    words = ["predict", str(model), "data/validate"]
    # a job has one thread, and sums of another number of threads differ in their last bit
    environment = os.environ | cluster.environment | {"OMP_NUM_THREADS": "1"}

    def run(*more):
        return subprocess.run(
            [sys.executable, "-m", "ensemble_kit", *words, *more],
            cwd=own_workspace.path, env=environment, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip

    there = run("-o", "there/", "--on", getattr(cluster, address))
    here = run("-o", "here/")

    assert (there.returncode, here.returncode) == (0, 0), there.stderr
    assert " finished on " in there.stderr
    files = sorted(path.name for path in (own_workspace.path / "here").iterdir())
    assert len(files) > 1
    assert sorted(path.name for path in (own_workspace.path / "there").iterdir()) == files
    for name in files:
        folders = [own_workspace.path / folder / name for folder in ("here", "there")]
        assert folders[0].read_bytes() == folders[1].read_bytes()


@pytest.mark.ray
def test_a_run_is_trained_by_one_command_only(cluster, own_workspace):  # noqa: F811
    from ensemble_kit.engines.ray import ray_cluster

    run = own_workspace.path / "elsewhere" / "mean"
    with ray_cluster(cluster.address, folders=[run], cpus_each=1, gpus_each=0):
        result = other_command(cluster, own_workspace.path)

    assert result.returncode == 1
    assert result.stderr.endswith(
        f"Error: {run} is being written by another command on this cluster.\n"
        "Wait until it has ended, or name another output.\n"
    )


@pytest.mark.ray
def test_a_node_that_dies_has_its_run_go_on_elsewhere_bit_for_bit(tmp_path, own_workspace):
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    runs = own_workspace.path / "elsewhere"
    words = ("--set", "training.max_steps=4000", "--set", "training.checkpoint_every=200")
    job = Job(
        "mean", ("train", *TRAINING[:2], *words, "-o", "elsewhere", "--", "recipes/mean.toml")
    )
    undisturbed = Job("mean", tuple(word.replace("elsewhere", "alone") for word in job.words))
    (end,) = run_jobs(
        [undisturbed], partial(start_process, threads=1), at_once=1, on_end=lambda _: None
    )
    assert end.state == "finished", end
    cluster = Cluster(tmp_path, head_cpus=0, others=2)  # noqa: F811
    try:

        def end_the_node():
            ((_, pid),) = cluster.jobs()
            (node,) = [n for n in cluster.nodes if pid in descendants(n.pid)]
            cluster.end(node)

        thread = when(have_checkpoints(runs, "mean"), end_the_node)
        with connected(cluster, own_workspace.path) as start:
            (end,) = run_jobs([job], start, at_once=1, on_end=lambda _: None)
        thread.join()
    finally:
        cluster.close()

    assert end.state == "finished", end
    last = "checkpoints/step-00004000.safetensors"
    assert (runs / "mean" / last).read_bytes() == (
        own_workspace.path / "alone" / "mean" / last
    ).read_bytes()
