"""One job as a process somewhere on a Ray cluster: an actor owns the process and watches it.

All jobs are started at once, and Ray lets them wait until a machine has what they ask for. A job
whose machine dies is started again elsewhere; commands of the kit resume from what is on the disk,
which all machines must share. Ray listens on all interfaces: see the page "More than one machine".
"""

import hashlib
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os.path import isfile
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ensemble_kit.engines.jobs import Job, JobEnd, Start
from ensemble_kit.engines.processes import START_ON_CLUSTER, pass_on, start_process
from ensemble_kit.errors import JobError
from ensemble_kit.interrupts import SIGNALS

NAMESPACE = "ensemble-kit"
STARTS = 4  # of one job, whose machine may die; after so many the job itself is the likely reason
INSTALL = "Install it with pip install 'ensemble-kit[ray]', here and on every machine."


class Worker:
    """The actor: starts one process, hands on what it prints, and says how it has ended.

    A process dies with the thread that has started it, so that thread does nothing but wait.
    """

    def __init__(self, job: Job, threads: int, folder: str) -> None:
        self._job = job
        self._events: SimpleQueue[str | JobEnd] = SimpleQueue()
        self._started = threading.Event()
        self._options: dict[str, Any] = {
            "threads": threads,
            "folder": folder,
            "environment": {"OMP_NUM_THREADS": str(threads)},
            "start": START_ON_CLUSTER,
            "on_line": lambda _, line: self._events.put(line),
        }
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._process = start_process(self._job, **self._options)
        except OSError as error:
            problem = f"it cannot be started: {error.strerror}: {error.filename}."
            self._events.put(JobEnd(self._job, "failed", problem=problem))
            return
        self._started.set()
        self._events.put(self._process.wait())

    def node(self) -> str:
        """Return the name of the machine."""
        import ray

        context = ray.get_runtime_context()
        return f"{socket.gethostname()} (node {context.get_node_id()[:8]})"

    def take(self) -> list[str | JobEnd]:
        """Return what there is of lines that the process has printed; last of all, its end."""
        events = [self._events.get()]
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def stop(self) -> None:
        """Send the process what Ctrl-C sends."""
        if self._started.wait(60):
            self._process.stop()

    def kill(self) -> None:
        """End the process and everything that it has started."""
        if self._started.wait(60):
            self._process.kill()


class RayJob:
    """A job on a cluster; see ``RunningJob``."""

    def __init__(self, job: Job, start_actor: Callable[[Job], Any]) -> None:
        self._job = job
        self._start_actor = start_actor
        self._actor = start_actor(job)
        self._is_stopped = False
        self._node = ""

    def wait(self) -> JobEnd:
        """Return when the job has ended, started again elsewhere if its machine died."""
        import ray

        problem = ""
        for _ in range(STARTS):
            try:
                return self._watch()
            except ray.exceptions.RayActorError as error:
                problem = " ".join(str(error).split())
                if self._is_stopped:
                    return JobEnd(self._job, "stopped", node=self._node)
                pass_on(self._job, f"{self._node or 'its machine'} is lost; starting again\n")
                self._node = ""
                self._actor = self._start_actor(self._job)
            except ray.exceptions.RayError as error:
                problem = " ".join(str(error).split())
                break
        return JobEnd(self._job, "failed", problem=problem[:500], node=self._node)

    def _watch(self) -> JobEnd:
        import ray

        self._node = ray.get(self._actor.node.remote())
        while True:
            for event in ray.get(self._actor.take.remote()):
                if isinstance(event, JobEnd):
                    ray.kill(self._actor)
                    return JobEnd(self._job, event.state, event.printed, event.problem, self._node)
                pass_on(self._job, event)

    def stop(self) -> None:
        """Ask the job to save its work and end; one that still waits for a machine ends at once."""
        import ray

        self._is_stopped = True
        self._actor.stop.remote() if self._node else ray.kill(self._actor)

    def kill(self) -> None:
        """End the job and everything that it has started."""
        self._is_stopped = True
        self._actor.kill.remote()


@contextmanager
def ray_cluster(
    address: str, *, folders: Sequence[Path], cpus_each: int, gpus_each: float
) -> Iterator[Start]:
    """Connect to a Ray cluster, and yield what starts a job on it.

    Args:
        address: ``auto``, or ``ray://HOST:10001`` of its head.
        folders: What the jobs write, which no other command on the cluster may write meanwhile.
        cpus_each: CPUs that each job asks for, which are its threads as well.
        gpus_each: GPUs that each job asks for.

    Raises:
        JobError: There is no such cluster, no machine of it has what a job asks for, the folders
            are not shared by all machines, or another command is writing them.
    """
    ray = _ray()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    except (
        Exception
    ) as error:  # Ray has one for each layer: ConnectionError, RuntimeError, RpcError
        reason = " ".join(str(error).split())[:300]
        raise JobError(
            f"There is no Ray cluster at {address} that lets us in: {reason}",
            hint="Start one with `ray start --head`, and give this command the same RAY_AUTH_MODE "
            "and RAY_AUTH_TOKEN.",
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself
            signal.signal(number, handler)
    try:
        nodes = _fitting(ray.nodes(), cpus_each, gpus_each)
        leases = [_lease(ray, folder.absolute()) for folder in folders]
        for folder in folders:
            _require_shared(ray, folder.absolute(), nodes)
        actors = ray.remote(
            num_cpus=cpus_each, num_gpus=gpus_each, max_concurrency=4, max_restarts=0
        )(Worker)

        def start(job: Job) -> RayJob:
            return RayJob(job, lambda job: actors.remote(job, cpus_each, os.getcwd()))

        yield start
        del leases  # until here: Ray ends an actor that nothing refers to
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise JobError("Ray is not installed.", hint=INSTALL) from error
    return ray


def _fitting(nodes: Sequence[Mapping[str, Any]], cpus: int, gpus: float) -> list[str]:
    """Return the ids of the machines that could run a job; Ray would wait for ever for none."""
    alive = [node for node in nodes if node["Alive"]]
    fitting = [
        str(node["NodeID"])
        for node in alive
        if node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus
    ]
    if not fitting:
        most = max((node["Resources"].get("CPU", 0) for node in alive), default=0)
        most_gpus = max((node["Resources"].get("GPU", 0) for node in alive), default=0)
        raise JobError(
            f"A job asks for {cpus} CPUs and {gpus:g} GPUs; of the {len(alive)} machines none has "
            f"them: at most {most:g} CPUs and {most_gpus:g} GPUs.",
            hint="Ask for less with --cpus-each and --gpus-each, or add a machine.",
        )
    return fitting


class Lease:
    """An actor whose name says that a folder is being written; it ends with the command."""


def _lease(ray: Any, folder: Path) -> Any:
    """Return an actor that keeps other commands on the cluster from writing a folder.

    File locks may not exist on a network disk.
    """
    name = f"folder-{hashlib.sha256(os.fsencode(folder)).hexdigest()}"
    try:
        lease = ray.remote(num_cpus=0)(Lease).options(name=name, namespace=NAMESPACE).remote()
        ray.get(lease.__ray_ready__.remote())
    except ValueError as error:
        raise JobError(
            f"{folder} is being written by another command on this cluster.",
            hint="Wait until it has ended, or name another output.",
        ) from error
    return lease


def _write_token(folder: str, name: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, name).write_text(name)


def _has_token(folder: str, name: str) -> bool:
    return isfile(Path(folder, name))


def _require_shared(ray: Any, folder: Path, nodes: Sequence[str]) -> None:
    """Let one machine write a file, and see that all others and this one can read it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f".shared-{uuid.uuid4().hex}"

    def on(node: str, function: Callable[..., Any]) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        remote = ray.remote(num_cpus=0, scheduling_strategy=strategy)(function)
        return remote.remote(str(folder), name)

    try:
        ray.get(on(nodes[0], _write_token))
        read = ray.get([on(node, _has_token) for node in nodes[1:]])
        if not all(read) or not _has_token(str(folder), name):
            raise JobError(
                f"{folder} is not shared: a file that one machine of the cluster writes there is "
                "not seen by another.",
                hint="Put the workspace on a disk that every machine mounts at the same path.",
            )
    finally:
        with suppress(OSError):
            (folder / name).unlink()
