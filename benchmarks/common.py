"""What the benchmarks share: work in turn, each piece in a fresh process, and the table of it."""

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Figures = dict[str, float]
MIB = 2**20


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Return a parser with ``--quick`` and ``--json``, described by the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="try it out on a little work")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one object")
    return parser


def machine() -> str:
    """Say what runs this: processor, cores, load, system, Python."""
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    name = found[1] if found else platform.machine()
    load = os.getloadavg()[0]
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores, load {load:.1f} before, {system}"


def versions(*packages: str) -> tuple[str, list[str]]:
    """Return ``numpy 2.4.6, ...`` of the packages that are installed, and those that are not."""
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    return ", ".join(found), missing


def alone(function: Callable[..., Figures], *arguments: Any) -> Figures:
    """Call a function of a module in a fresh process; add the process's ``peak_bytes``.

    The function times its own work, so that imports and preparation do not count; the peak holds
    everything, the interpreter included.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable[..., Figures], arguments: tuple[Any, ...]) -> Figures:
    return {**function(*arguments), "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Return the most memory that this process has had; Linux only.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def in_turn(
    work: Mapping[str, Callable[[], Figures]], *, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Do all work ``rounds`` times, A B C A B C, so that a slow minute hits everybody alike.

    Returns:
        The values of each figure, by the name of the work and that of the figure.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in work}
    for number in range(rounds):
        for name, function in work.items():
            print(f"round {number + 1} of {rounds}: {name} ...", file=sys.stderr)
            figures = function()
            print(f"    {figures}", file=sys.stderr)
            for figure, value in figures.items():
                found[name].setdefault(figure, []).append(value)
    return found


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return how many times larger the median of the first values is."""
    return median(slower) / median(faster)


def spread(values: Sequence[float], *, digits: int = 2, unit: float = 1.0) -> str:
    """Write a median and its range, in multiples of ``unit``: ``1.25 (1.20 to 1.31)``."""
    low, middle, high = (v / unit for v in (min(values), median(values), max(values)))
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown; all columns but the first are numbers, to the right."""
    print(f"\n| {' | '.join(columns)} |")
    print(f"|---|{'---:|' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_steps(steps: Mapping[str, Figures]) -> None:
    """Print seconds, bytes written and peak memory of steps that were done once each."""
    print_table(
        ["step", "s", "MiB written", "peak MiB"],
        [
            [name, f"{step['seconds']:.1f}", f"{step['bytes'] / MIB:,.1f}",
             f"{step['peak_bytes'] / MIB:,.0f}"]
            for name, step in steps.items()
        ],
    )  # fmt: skip


def print_json(*, ratios: Mapping[str, float], **figures: Any) -> None:
    """Print one object: ``ratios``, how many times better ours is than each peer, and the rest."""
    print(json.dumps({"ratios": ratios, **figures}))


def copy_bandwidth(*, size: int = 256 << 20, rounds: int = 5) -> float:
    """Return the bytes a second that one core copies from memory to memory, the best of rounds."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)
