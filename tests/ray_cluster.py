"""A Ray cluster of two nodes on this machine, each with processes that can be ended alone."""

import glob
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec

import pytest

TOKEN = secrets.token_hex(16)  # Ray reads it once a process
PATIENCE = 120  # seconds until a node is up


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Cluster:
    """A head and other nodes with one CPU each; the environment that lets a driver in.

    Attributes:
        address: What a driver on one of the nodes connects to.
        client: What a driver elsewhere connects to.
    """

    def __init__(self, folder, *, head_cpus=1, others=1):
        self.folder = folder
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        client_port = free_port()
        self.client = f"ray://127.0.0.1:{client_port}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.nodes = []
        os.environ.update(self.environment)  # before Ray is imported
        self.start(
            head_cpus, "--head", f"--port={self.port}", f"--ray-client-server-port={client_port}",
            "--include-dashboard=false",
        )  # fmt: skip
        for _ in range(others):
            self.start(1, f"--address={self.address}")

    def start(self, cpus, *words):
        """Start a node, and return when it says so."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                 f"--num-cpus={cpus}", "--object-store-memory=80000000",
                 "--disable-usage-stats", *words],
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=os.environ | self.environment, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        until = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        return node

    def end(self, node):
        """Kill a node and all that it runs, as a machine that loses its power."""
        for pid in descendants(node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def close(self):
        for node in self.nodes:
            if node.poll() is None:
                self.end(node)

    def jobs(self):
        """Return the ids of all processes of the kit that the nodes run, as ``(actor, job)``."""
        pids = [pid for node in self.nodes for pid in descendants(node.pid)]
        return [(parent_of(pid), pid) for pid in pids if "die_with_parent" in words_of(pid)]


def words_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def variables_of(pid):
    with open(f"/proc/{pid}/environ") as file:
        return dict(line.split("=", 1) for line in file.read().split("\0") if "=" in line)


def parent_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(") ")[2].split()[1])


def descendants(pid):
    """Return a process and all that came of it, the oldest first."""
    found = [pid]
    for each in found:
        for children in glob.glob(f"/proc/{each}/task/*/children"):  # of each of its threads
            with suppress(FileNotFoundError, ProcessLookupError), open(children) as file:
                found += [int(word) for word in file.read().split()]
    return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A cluster for all tests that only use it."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    cluster = Cluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.close()
