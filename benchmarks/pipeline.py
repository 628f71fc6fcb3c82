"""Seconds of each stage of the whole pipeline, on both examples.

There is no peer in this benchmark: nothing else goes from records to one ONNX file. The table shows
where the time goes, on the machine that its first line names. Below the table stand the GAPs before
and after rounding, and the table of models that the example prints at its end.

    python benchmarks/pipeline.py DATA [--quick] [--json]

DATA is the folder that the examples take. ``--quick`` trains for a few steps only.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import MIB, Figures, machine, parser_of, print_json, print_table, versions

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(name: str, data: Path, *, is_quick: bool) -> tuple[Figures, str]:
    """Run an example in a folder that is thrown away; return seconds by stage and its results."""
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
    printed = done.stdout.splitlines()
    commands = [number for number, line in enumerate(printed) if line.startswith("$ ")]
    rounded = [line for line in printed if " before rounding, " in line]
    return seconds, "\n".join([*rounded, *printed[commands[-1] :]])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    about = f"{machine()}; {versions('torch', 'numpy', 'onnxruntime-gpu')[0]}"
    found, results = {}, {}
    for name in ("audioset.sh", "youtube8m_video.sh"):
        print(f"running examples/{name} ...", file=sys.stderr)
        found[name], results[name] = run_example(name, options.data, is_quick=options.quick)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if options.as_json:
        print_json(ratios={}, machine=about, seconds=found, peak_bytes=peak, results=results)
        return
    print(f"{about}; peak memory of a stage {peak / MIB:.0f} MiB")
    for name, seconds in found.items():
        rows = [*seconds.items(), ("sum", sum(seconds.values()))]
        print_table([f"examples/{name}", "s"], [[stage, f"{each:.1f}"] for stage, each in rows])
        print(f"\n{results[name]}")


if __name__ == "__main__":
    main()
