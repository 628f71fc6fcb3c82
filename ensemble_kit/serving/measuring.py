"""How long an exported file takes to open and to tag a video, and what memory that needs.

Both are measured in a process that does nothing else, as a server would be.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ensemble_kit.errors import ExportError

RUNS = 5  # of which the median counts; the first run of all is left out
NUMPY_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


@dataclass(frozen=True)
class Served:
    """What serving a file took on one machine.

    Attributes:
        open_seconds: From the file's name to a session that runs.
        video_seconds: The median time for one video of ``frames`` frames, on the CPU.
        frames: The frames of that video, as many as the longest may have.
        peak_bytes: The most memory that the process had, Python and ONNX Runtime included; None
            where the system does not say.
        machine: The processor, with how many of its threads the process may use.
        software: The versions of ONNX Runtime and Python.
    """

    open_seconds: float
    video_seconds: float
    frames: int
    peak_bytes: int | None
    machine: str
    software: str


def measure_serving(path: Path, frames: int) -> Served:
    """Open a file in a new process, and tag one video of so many frames several times.

    Raises:
        ExportError: The process ended with an error.
    """
    code = "from ensemble_kit.serving.measuring import measure_here; measure_here()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(frames)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ExportError(
            f"{path} could not be measured: {reason.rstrip('.')}.",
            hint="Export it without --measure.",
        )
    return Served(**json.loads(done.stdout))


def measure_here() -> None:
    """Measure the file and the frames that the command line names, and print JSON."""
    import onnxruntime

    from ensemble_kit.serving.session import OnnxEnsemble

    path, frames = sys.argv[1], int(sys.argv[2])
    start = time.perf_counter()
    ensemble = OnnxEnsemble(path)
    open_seconds = time.perf_counter() - start
    video = {
        port.name: np.zeros((1, frames, port.shape[2]), NUMPY_TYPES[port.type])
        for port in ensemble.session.get_inputs()
        if port.type in NUMPY_TYPES and not port.name.startswith("draws_")
    }
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        ensemble.run(video, np.array([frames]))
        seconds.append(time.perf_counter() - start)
    served = Served(
        open_seconds=open_seconds,
        video_seconds=statistics.median(seconds[1:]),
        frames=frames,
        peak_bytes=_peak_bytes(),
        machine=f"{_processor()}, {len(os.sched_getaffinity(0))} threads"
        if hasattr(os, "sched_getaffinity")
        else _processor(),
        software=f"ONNX Runtime {onnxruntime.__version__}, Python {platform.python_version()}",
    )
    print(json.dumps(asdict(served)))


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    return platform.processor() or platform.machine()
