"""Opening the six-member system of S5 at full size: as one file, and with weights that are mapped.

521 million random weights are fused in bf16, int8 and int4, each exported both ways. Each row is a
fresh process that opens the file with ``ensemble_kit.runtime``, then tags videos of 300 frames.
Files come from the page cache: they have just been written. Processor seconds do not count other
work on the machine.

    python benchmarks/opening.py [--quick] [--json] [--rounds N] [--files FOLDER] [--only ROW]

It wants 8 GB of disk for temporary files and 5 GB of memory. ``--quick`` takes small members.
``--files`` makes the files in a folder that is kept, and uses those that are there; ``--only``,
which may be given several times, runs only these rows.
"""

import re
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from common import (
    MIB,
    Figures,
    alone,
    in_turn,
    machine,
    parser_of,
    print_json,
    print_steps,
    print_table,
    ratio,
    spread,
    versions,
)
from nonlocal_system import FRAMES, SYSTEM, build, fuse

REPEATS = 10
BATCHES = (1, 32)
RUNTIME = {"is_mapped": False}  # opened by its name, as ONNX Runtime does without the kit
DTYPES = ("bf16", "int8", "int4")
# What is opened, and how: the file, and what OnnxEnsemble is told
WAYS = {
    "bf16, opened by its name": ("bf16.onnx", RUNTIME),
    "bf16": ("bf16.onnx", {}),
    "bf16, low_memory=True": ("bf16.onnx", {"low_memory": True}),
    "bf16 --low-memory, low_memory=False": ("bf16-mapped.onnx", {"low_memory": False}),
    "bf16 --low-memory": ("bf16-mapped.onnx", {}),
    "bf16 --low-memory, keep_memory=False": ("bf16-mapped.onnx", {"keep_memory": False}),
    "int8, opened by its name": ("int8.onnx", RUNTIME),
    "int8": ("int8.onnx", {}),
    "int8 --low-memory": ("int8-mapped.onnx", {}),
    "int8, computes=float32": ("int8.onnx", {"computes": "float32"}),
    "int4, opened by its name": ("int4.onnx", RUNTIME),
    "int4": ("int4.onnx", {}),
    "int4 --low-memory": ("int4-mapped.onnx", {}),
    "int4, computes=float32": ("int4.onnx", {"computes": "float32"}),
}


def export(fused: Path, output: Path, low_memory: bool) -> Figures:
    from ensemble_kit import export_onnx

    start = time.perf_counter()
    exported = export_onnx(fused, output, repeats=REPEATS, low_memory=low_memory)
    return {"seconds": time.perf_counter() - start, "bytes": exported.num_bytes}


def run(path: Path, options: Mapping[str, bool | str]) -> Figures:
    """Open a file, and tag videos in batches of each size, warm."""
    from ensemble_kit.errors import ExportError
    from ensemble_kit.runtime import OnnxEnsemble
    from ensemble_kit.serving import session

    def refuse(path: Path) -> bytes:
        raise ExportError(f"{path} is not to be mapped.", hint="Open it by its name.")

    options = dict(options)
    if not options.pop("is_mapped", True):
        session.mapped_model = refuse
    before = _resident()
    start, processor = time.perf_counter(), time.process_time()
    ensemble = OnnxEnsemble(path, **options)
    figures = {
        "open": time.perf_counter() - start,
        "processor": time.process_time() - processor,
    }
    figures |= {kind: size - before[kind] for kind, size in _resident().items()}
    random = np.random.default_rng(0)
    for batch_size in BATCHES:
        frames = {
            name: random.integers(0, 256, (batch_size, FRAMES, width), dtype=np.uint8)
            for name, width in {"rgb": 1024, "audio": 128}.items()
        }
        seconds, processors = [], []
        for _ in range(3):
            start, processor = time.perf_counter(), time.process_time()
            ensemble.run(frames, np.full(batch_size, FRAMES))
            seconds.append(time.perf_counter() - start)
            processors.append(time.process_time() - processor)
        figures[f"batch of {batch_size}"] = min(seconds[1:])
        figures[f"processor, batch of {batch_size}"] = min(processors[1:])
    return figures | {"left": _resident()["own"] - before["own"]}


def _resident() -> Figures:
    """Return the bytes in memory: the process's own, and those of mapped files."""
    status = Path("/proc/self/status").read_text()
    names = {"own": "RssAnon", "mapped": "RssFile"}
    return {
        kind: int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024
        for kind, name in names.items()
    }


def make_files(folder: Path, is_quick: bool) -> dict[str, Figures]:
    """Make those files that a folder does not have yet; return what each step took."""
    steps = {}
    if not folder.exists():
        alone(build, folder, "nonlocal", SYSTEM, is_quick, False)
    for dtype in DTYPES:
        fused = folder / f"{dtype}.safetensors"
        if not fused.exists():
            steps[f"fuse {dtype}"] = alone(fuse, folder / "selection.json", fused, dtype)
        for suffix, is_mapped in (("", False), ("-mapped", True)):
            file = folder / f"{dtype}{suffix}.onnx"
            if not file.exists():
                steps[f"export {file.name}"] = alone(export, fused, file, is_mapped)
    return steps


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=Path, help="keep the files in this folder")
    parser.add_argument("--only", action="append", choices=[*WAYS], metavar="ROW")
    options = parser.parse_args()
    described, (packages, _) = machine(), versions("onnxruntime-gpu", "torch", "numpy")
    with tempfile.TemporaryDirectory() as name:
        folder = (options.files or Path(name)) / "system"
        steps = make_files(folder, options.quick)
        wanted = {way: WAYS[way] for way in options.only or WAYS}
        work = {way: partial(alone, run, folder / file, how) for way, (file, how) in wanted.items()}
        runs = in_turn(work, rounds=options.rounds)
    if options.as_json:
        keys = ("open", "processor", "peak_bytes", *(f"batch of {number}" for number in BATCHES))
        print_json(
            ratios={
                f"{way}: {key}": ratio(runs["bf16"][key], runs[way][key])
                for way in runs if way != "bf16" and "bf16" in runs
                for key in keys
            },
            machine=described,
            versions=packages,
            steps=steps,
            runs=runs,
        )  # fmt: skip
        return
    print(f"{described}; {packages}")
    print_steps(steps)
    print_table(
        ["opened", "s to open", "processor s to open", "own MiB open", "mapped MiB open",
         "own MiB after runs", "peak MiB",
         *(f"{unit}, batch of {n}" for n in BATCHES for unit in ("s", "processor s"))],
        [
            [
                way,
                spread(values["open"]),
                spread(values["processor"]),
                *(spread(values[kind], digits=0, unit=MIB)
                  for kind in ("own", "mapped", "left", "peak_bytes")),
                *(spread(values[f"{kind}batch of {n}"])
                  for n in BATCHES for kind in ("", "processor, ")),
            ]
            for way, values in runs.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
