"""Seconds and memory of averaging five checkpoints of 400 MB, beside the usual ways.

    python benchmarks/average_checkpoints.py [--quick] [--json]

Each way averages the same files in its own process, in turn, five times: read, average,
write, flush to the disk. The files have just been written, so they come from the page cache. Beside
``average_checkpoints`` as it is, which also takes the SHA-256 of every file it averages, stands
what it takes without. The floor reads and writes the same bytes and computes nothing. ``--quick``
takes checkpoints of 79 MB, twice.
"""

import hashlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from common import (
    MIB,
    Figures,
    alone,
    copy_bandwidth,
    in_turn,
    machine,
    parser_of,
    print_json,
    print_table,
    ratio,
    spread,
    versions,
)
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from ensemble_kit.averaging import average as averages
from ensemble_kit.averaging.stage import average_checkpoints
from ensemble_kit.data.schema import Modality, Schema
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import load_recipe
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.tensor_files import save_tensors

RECIPES = {False: "dml/bi-gru-projection", True: "demo/netvlad"}  # by --quick: 405 and 79 MB
SCHEMA = Schema(
    level="frame",
    modalities=[
        Modality(name="rgb", key="rgb", width=1024, value_type="uint8"),
        Modality(name="audio", key="audio", width=128, value_type="uint8"),
    ],
    id_key="id",
    labels_key="labels",
    num_classes=3862,
)
BLOCK = 2**20  # bytes the floor reads at a time
SECONDS_BETWEEN_LOOKS = 0.002


def ours(paths: list[Path], output: Path) -> None:
    average_checkpoints(paths, output, batch_norm="average")


def ours_without_hashes(paths: list[Path], output: Path) -> None:
    averages.sha256_of = lambda path: "0" * 64
    ours(paths, output)


def averaged_model(paths: list[Path], output: Path, model: SubModel) -> None:
    average = AveragedModel(model)
    for path in paths:
        model.load_state_dict(load_file(path))
        average.update_parameters(model)
    save_file(average.module.state_dict(), output)


def whole_dicts(paths: list[Path], output: Path, dtype: torch.dtype) -> None:
    """Sum whole dicts, in float64 as timm's avg_checkpoints.py does, or leaner in float32."""
    total = {name: tensor.to(dtype) for name, tensor in load_file(paths[0]).items()}
    for path in paths[1:]:
        for name, tensor in load_file(path).items():
            total[name] += tensor
    mean = {name: tensor.div_(len(paths)).float() for name, tensor in total.items()}
    save_file(mean, output)


def floor(paths: list[Path], output: Path) -> None:
    buffer = memoryview(bytearray(BLOCK))
    files = [path.open("rb", buffering=0) for path in paths]
    with output.open("wb", buffering=0) as written:
        while True:
            for file in files:
                size = file.readinto(buffer)
            if not size:
                break
            written.write(buffer[:size])
    for file in files:
        file.close()


WAYS: dict[str, Callable[..., None]] = {
    "ensemble-kit": ours,
    "ensemble-kit, nothing hashed": ours_without_hashes,
    "AveragedModel": averaged_model,
    "whole dicts, float64": partial(whole_dicts, dtype=torch.float64),
    "whole dicts, float32": partial(whole_dicts, dtype=torch.float32),
    "floor: read and write": floor,
}
PEERS = ("AveragedModel", "whole dicts, float64", "whole dicts, float32")


def timed(way: str, paths: list[Path], output: Path, recipe: str) -> Figures:
    """Average in this process; return seconds, those of all its threads, and anonymous memory."""
    arguments = [SubModel(load_recipe(recipe), SCHEMA)] if way == "AveragedModel" else []
    with anonymous_memory() as peak:
        start, start_cpu = time.perf_counter(), time.process_time()
        WAYS[way](paths, output, *arguments)
        with output.open("rb+") as file:
            os.fsync(file.fileno())
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "anonymous_bytes": peak[0]}


@contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """Yield a list whose one entry is, at the end, the most anonymous memory that was seen."""
    peak, is_over = [0], threading.Event()

    def look() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) * 1024)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


def interpreter() -> Figures:
    """Return nothing: this process's peak is that of Python with all that was imported."""
    return {}


def write_checkpoint(path: Path, recipe_name: str, step: int) -> None:
    """Write the checkpoint of a made-up run."""
    torch.manual_seed(step)
    recipe = load_recipe(recipe_name)
    record = CheckpointMetadata(
        kit_version="0.0",
        name="made-up",
        run="made-up",
        recipe=recipe.metadata,
        data_schema=SCHEMA,
        step=step,
        examples=step,
        seed=0,
        training_files=(),
    )
    state = SubModel(recipe, SCHEMA).state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    save_tensors(path, state, record, force=False)


def worst_difference(one: Path, other: Path, names: list[str]) -> float:
    first, second = load_file(one), load_file(other)
    return max(float((first[name] - second[name]).abs().max()) for name in names)


def hash_bandwidth(path: Path) -> float:
    start = time.perf_counter()
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    return path.stat().st_size / (time.perf_counter() - start)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    recipe = RECIPES[options.quick]
    line = f"{machine()}; {torch.get_num_threads()} torch threads"
    packages, _ = versions("torch", "safetensors", "numpy")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"step-{step}.safetensors" for step in range(1, 6)]
        for step, path in enumerate(paths, start=1):
            print(f"writing {path.name} ...", file=sys.stderr)
            write_checkpoint(path, recipe, step)
        outputs = {way: folder / f"{number}.safetensors" for number, way in enumerate(WAYS)}

        def run(way: str) -> Figures:
            outputs[way].unlink(missing_ok=True)
            return alone(timed, way, paths, outputs[way], recipe)

        found = in_turn({way: partial(run, way) for way in WAYS}, rounds=2 if options.quick else 5)
        parameters = [name for name, _ in SubModel(load_recipe(recipe), SCHEMA).named_parameters()]
        differences = {
            way: worst_difference(outputs["ensemble-kit"], outputs[way], parameters)
            for way in (*PEERS, "ensemble-kit, nothing hashed")
        }
        size = paths[0].stat().st_size
        hashed = hash_bandwidth(paths[0])
        base = alone(interpreter)["peak_bytes"]
    for way, difference in differences.items():
        # float64 sums are ours to the bit; float32 ones of five numbers up to 6 are off by some eps
        assert difference <= (4e-6 if way in ("AveragedModel", PEERS[2]) else 0), (way, difference)
    copied = copy_bandwidth()
    ratios = {
        f"{way} against {peer}": ratio(found[peer]["seconds"], found[way]["seconds"])
        for way in ("ensemble-kit", "ensemble-kit, nothing hashed")
        for peer in (*PEERS, "floor: read and write")
    }
    if options.as_json:
        print_json(ratios=ratios, machine=line, versions=packages, figures=found,
                   checkpoint_bytes=size, interpreter_bytes=base, differences=differences,
                   copy_bytes_per_second=copied, hash_bytes_per_second=hashed)  # fmt: skip
        return
    print(f"{line}; {packages}")
    print(
        f"5 checkpoints of {size / 1e6:.0f} MB ({recipe}); one core copies "
        f"{copied / 1e9:.1f} GB/s and hashes {hashed / 1e9:.1f} GB/s."
    )
    print_table(
        ("way", "s", "CPU s", "peak MiB", "anonymous", "less the interpreter's, in checkpoints"),
        (
            (
                way,
                spread(figures["seconds"]),
                spread(figures["cpu_seconds"]),
                spread(figures["peak_bytes"], digits=0, unit=MIB),
                spread(figures["anonymous_bytes"], digits=0, unit=MIB),
                spread([peak - base for peak in figures["peak_bytes"]], unit=size),
            )
            for way, figures in found.items()
        ),
    )
    print(f"\nPython with all that is imported takes {base / MIB:.0f} MiB of each peak.\n")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} times as fast")


if __name__ == "__main__":
    main()
