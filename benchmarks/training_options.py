"""What balance, mixup, smoothed labels and a part's own learning rate bring, each alone.

    python benchmarks/training_options.py DATA [moe netvlad] [--steps 400] [--seeds 3] [--json]

DATA/audioset/frame/{train,validate,test} are AudioSet's records. A recipe at the size of
examples/audioset.sh is trained with each option and each seed, its averaged checkpoint predicts the
test records, and the table says the mean GAP@20 and mean average precision over classes (whole
rankings), with the least and the most of the seeds. The files lie in --folder, where what is
finished is not trained again.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from common import machine, parser_of, print_json, print_table

SCHEDULE = {
    "training.batch_size": 128,
    "training.learning_rate_decay": 0.8,
    "training.examples_per_decay": 20_000,
    "training.batch_norm_momentum": 0.02,
    "training.checkpoint_every": 100,
    "training.average_last": 3,
}
RECIPES = {
    "moe": ("willow/average-moe-cg", {"training.learning_rate": 0.01}),
    "netvlad": (
        "willow/gated-net-vlad",
        {
            "training.learning_rate": 0.002,
            "pooling.num_clusters": 16,
            "hidden.size": 1024,
            "head.num_experts": 4,
        },
    ),
}
OPTIONS = {
    "none": {},
    "balance 0.25": {"training.balance": 0.25},
    "balance 0.5": {"training.balance": 0.5},
    "mixup 0.5": {"training.mixup": 0.5},
    "label smoothing 0.02": {"training.label_smoothing": 0.02},
    "head at 0.3 of the rate": {"training.learning_rate_factors.head": 0.3},
}


def main() -> None:
    """Train what is not trained yet, and print a table for each recipe."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    print(machine(), file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        records = arguments.data.absolute() / "audioset" / "frame"
        found = {
            recipe: {
                option: [
                    measure(folder, records, recipe, option, seed, arguments.steps)
                    for seed in range(arguments.seeds)
                ]
                for option in OPTIONS
            }
            for recipe in arguments.recipes
        }
    if arguments.json:
        print_json(ratios={}, results=found)
        return
    for recipe, rows in found.items():
        print_table(
            [f"{recipe}, {arguments.steps} steps, {arguments.seeds} seeds", "test GAP@20", "mAP"],
            [
                [option, *map(spread_of, zip(*values, strict=True))]
                for option, values in rows.items()
            ],
        )


def measure(
    folder: Path, records: Path, recipe: str, option: str, seed: int, steps: int
) -> tuple[float, float]:
    """Train, average and evaluate one run; return GAP@20 and mAP of the test records."""
    name = f"{recipe}-{''.join(c if c.isalnum() else '-' for c in option)}-{seed}"
    source, values = RECIPES[recipe]
    sets = {**SCHEDULE, **values, **OPTIONS[option], "training.max_steps": steps}
    chosen = [text for key, value in sets.items() for text in ("--set", f"{key}={value}")]
    kit(
        folder, "train", source, "--name", name, "--seed", str(seed), "--quiet", *chosen,
        "--train", str(records / "train"), "--validation", str(records / "validate"),
    )  # fmt: skip
    result = folder / "runs" / name / "test.json"
    if not result.exists():
        model = f"runs/{name}/averaged.safetensors"
        text = kit(folder, "evaluate", model, str(records / "test"), "--rankings", "--json")
        result.write_text(text)
    metrics = json.loads(result.read_text())
    print(f"{name}: {metrics}", file=sys.stderr)
    return metrics["gap"], metrics["macro_map"]


def kit(folder: Path, *arguments: str) -> str:
    """Run a command of the kit in a folder, and return what it prints."""
    command = [sys.executable, "-m", "ensemble_kit", *arguments]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


def spread_of(values: tuple[float, ...]) -> str:
    """Return a mean with the least and the most."""
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()
