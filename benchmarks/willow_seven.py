"""WILLOW's seven at full size in one file under 1 GiB, by int4, with random weights.

1.2 billion numbers, which 1 GiB refuses in bf16: the message of the refusal, then the same members
fused in int4, exported with one repeat, compared with PyTorch, opened and run on one video.

    python benchmarks/willow_seven.py [--quick] [--json]

It wants 6 GB of disk for temporary files and 8 GB of memory. ``--quick`` takes small members.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from common import MIB, Figures, alone, machine, parser_of, print_json, versions
from nonlocal_system import FRAMES, WILLOW, build, fuse, refuse

LIMIT = 2**30


def export(fused: Path, output: Path) -> Figures:
    """Export the file; return its size, its proof's differences and the shares of its numbers."""
    from ensemble_kit import export_onnx

    start = time.perf_counter()
    exported = export_onnx(fused, output, repeats=1, max_size=LIMIT)
    proof = exported.proof
    return {
        "seconds": time.perf_counter() - start, "bytes": exported.num_bytes,
        "exact difference": proof.exact_difference,
        "shipped difference": proof.shipped_difference or 0.0,
        "as stored": proof.shares.as_stored, "converted once": proof.shares.converted_once,
        "converted in every run": proof.shares.converted_in_every_run,
    }  # fmt: skip


def run(path: Path) -> Figures:
    """Open the file, and run it on one video."""
    from ensemble_kit.runtime import OnnxEnsemble

    random = np.random.default_rng(0)
    widths = {"rgb": 1024, "audio": 128}
    frames = {
        name: random.integers(0, 256, (1, FRAMES, width), dtype=np.uint8)
        for name, width in widths.items()
    }
    start = time.perf_counter()
    ensemble = OnnxEnsemble(path)
    opened = time.perf_counter()
    seconds = []
    for _ in range(4):
        again = time.perf_counter()
        ensemble.run(frames, np.array([FRAMES]))
        seconds.append(time.perf_counter() - again)
    return {"open": opened - start, "seconds": min(seconds[1:])}


def main() -> None:
    options = parser_of(__doc__).parse_args()
    described = machine()
    packages, _ = versions("onnxruntime-gpu", "torch", "onnx", "numpy")
    steps: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "willow"
        alone(build, folder, "willow", WILLOW, options.quick, True)
        refusal = "" if options.quick else refuse(folder / "selection.json", folder / "f")
        fused, onnx = folder / "fused.safetensors", Path(temporary) / "ensemble.onnx"
        steps["fuse int4"] = alone(fuse, folder / "selection.json", fused, "int4")
        steps["export"] = alone(export, fused, onnx)
        steps["open and run"] = alone(run, onnx)
    if options.as_json:
        print_json(ratios={}, machine=described, versions=packages, refusal=refusal, steps=steps)
        return
    print(f"{described}\n{packages}\n\n{refusal}\n")
    for name, figures in steps.items():
        print(f"{name}: {figures['peak_bytes'] / MIB:,.0f} MiB at its peak")
        for key, value in figures.items():
            if key != "peak_bytes":
                print(f"    {key}: {value:,.6g}" if value < 1000 else f"    {key}: {value:,.0f}")


if __name__ == "__main__":
    main()
