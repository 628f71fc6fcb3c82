"""Seconds of each stage of the whole road, on both examples.

There is no peer here: nothing else goes from records to one ONNX file. The table says where the
time goes, on the machine that its first line names.

    python benchmarks/road.py DATA [--quick] [--json]

DATA is the folder that the examples take. ``--quick`` trains a few steps only.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PACKAGES = ("torch", "numpy", "onnxruntime-gpu")


def run_example(name: str, data: Path, *, is_quick: bool) -> tuple[dict[str, float], str]:
    """Run an example in a folder that is thrown away; return seconds by stage and its table."""
    environment = os.environ | ({"QUICK": "1"} if is_quick else {})
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(EXAMPLES / name), str(data), folder],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = (Path(folder) / "seconds.tsv").read_text().splitlines()
    seconds = {stage: float(number) for stage, number in (line.split("\t") for line in lines)}
    return seconds, done.stdout[done.stdout.rindex("$ ") :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    found = {}
    tables = {}
    for name in ("audioset.sh", "youtube8m_video.sh"):
        print(f"running examples/{name} ...", file=sys.stderr)
        found[name], tables[name] = run_example(name, options.data, is_quick=options.quick)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if options.as_json:
        print(json.dumps({"machine": machine, "versions": versions, "ratios": {},
                          "seconds": found, "peak_bytes": peak}))  # fmt: skip
        return
    print(f"{machine}; {versions}; peak memory of a stage {peak / 2**20:.0f} MiB")
    for name, seconds in found.items():
        print(f"\nexamples/{name}\n")
        for stage, number in seconds.items():
            print(f"{stage:<22} {number:8.1f} s")
        print(f"{'sum':<22} {sum(seconds.values()):8.1f} s\n\n{tables[name]}")


if __name__ == "__main__":
    main()
