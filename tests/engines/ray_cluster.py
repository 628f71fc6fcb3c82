"""A Ray cluster of two nodes on this machine, each with processes that can be ended alone."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import pytest

PATIENCE = 120  # seconds until a node is up


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Cluster:
    """Two nodes with one CPU each; the environment that lets a driver in."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.nodes = []
        self.start("--head", f"--port={self.port}", "--include-dashboard=false")
        self.start(f"--address={self.address}")

    def start(self, *words):
        """Start a node, and return when it says so."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
                 "--object-store-memory=80000000", "--disable-usage-stats", *words],
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
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        node.wait()

    def close(self):
        for node in self.nodes:
            if node.poll() is None:
                self.end(node)


def descendants(pid):
    """Return a process and all that came of it, the oldest first."""
    found = [pid]
    for each in found:
        try:
            with open(f"/proc/{each}/task/{each}/children") as file:
                found += [int(word) for word in file.read().split()]
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A cluster for all tests that only use it."""
    pytest.importorskip("ray", reason="Ray is not installed")
    cluster = Cluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.close()
