"""Examples a second on a GPU, and the share of time that training waits for data.

    python benchmarks/training_gpu.py [RECIPE ...] [--batch-size N ...] [--workers N] [--quick]
                                      [--json]

Each recipe is trained at full size on made-up records of 300 frames of 1,024 and 128 bytes and
3,862 classes, in float32, in bfloat16 by automatic mixed precision, and compiled, each in its
own process. What is timed is `train` itself, on the last lines of its log: graphs are compiled and
memory is touched before. FLOPs are those that PyTorch counts of a step's matrix products. Bytes are
the least that a step moves: weights read forwards and backwards, gradients written, read and
written by clipping, then Adam's four tensors read and three written; what layers hand each other
comes on top. The ceilings are what this card reaches in one large product, and in copying its own
memory.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from common import (
    Figures,
    alone,
    in_turn,
    machine,
    parser_of,
    print_json,
    print_table,
    ratio,
    spread,
    versions,
)

RECIPES = ("nonlocal/lfnl-netvlad", "nonlocal/soft-bof-8k", "nonlocal/gru")
BATCH_SIZES = (80, 1024)
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fp32": {},
        "fp32, compiled": {"compiled": True},
        "bf16": {"precision": "bf16"},
        "bf16, compiled": {"precision": "bf16", "compiled": True},
    }
)
NUM_LINES, NUM_WARM = 8, 3  # of the log, 50 steps each
STEP_BYTES = 4 * (2 + 1 + 2 + 4 + 3)  # moved for each weight, see above
SIZE = {"modalities": {"rgb": 1024, "audio": 128}, "num_classes": 3862, "frames": (300, 300)}


def train(
    recipe: str, batch_size: int, steps: int, data: str, workers: int, device: str, variant: str
) -> Figures:
    """Train some steps; return what the log says of its last lines, and the most memory."""
    import torch

    from ensemble_kit import Records, RunPlan, load_recipe
    from ensemble_kit.training import train_checkpoints

    schedule = {"batch_size": batch_size, "max_steps": steps, "checkpoint_every": steps}
    overrides = [f"training.{key}={value}" for key, value in schedule.items()]
    with tempfile.TemporaryDirectory() as folder:
        plan = RunPlan(
            recipe=load_recipe(recipe, overrides),
            training=Records([data]),
            folder=Path(folder) / "run",
            workers=workers,
            device=device,
            **VARIANTS[variant],
        )
        run = train_checkpoints(plan).folder
        lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    steady = [line for line in lines if "loss" in line][NUM_WARM:]
    return {
        "examples_per_second": median(line["examples_per_second"] for line in steady),
        "data_wait": median(line["data_wait"] for line in steady),
        "gpu_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    }


def work_of(recipe: str, data: str) -> Figures:
    """Return the floating-point operations of one example, forwards and backwards, and weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ensemble_kit.data.dataset import Records
    from ensemble_kit.networks.running import to_torch
    from ensemble_kit.networks.sub_model import SubModel
    from ensemble_kit.recipes.reading import load_recipe

    records = Records([data])
    model = SubModel(load_recipe(recipe), records.schema)
    choice = model.frame_choice
    batch = next(records.training_batches(2, seed=0, choice=choice))
    drawn = batch.frame_weights
    with FlopCounterMode(display=False) as counter:
        probabilities = model(
            *to_torch(batch, "cpu"),
            frame_weights=None if drawn is None else torch.from_numpy(drawn),
        )
        probabilities.sum().backward()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"flops": counter.get_total_flops() / 2, "weights": weights}


def ceilings(device: str) -> Figures:
    """Return FLOP/s of one large product in each precision, and bytes/s read and written."""
    import torch
    from torch.utils.benchmark import Timer

    size = 8192 if device == "cuda" else 512
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device=device, dtype=dtype)
        seconds = Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=1).median
        found[name] = 2 * size**3 / seconds
    source = torch.ones(size * size, device=device)
    target = torch.empty_like(source)
    copy = Timer("target.copy_(source)", globals={"target": target, "source": source})
    found["bytes"] = 2 * source.nbytes / copy.blocked_autorange(min_run_time=1).median
    return found


def main() -> int:
    """Run, and print a table or one object."""
    import torch

    parser = parser_of(__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--batch-size", type=int, action="append", metavar="N")
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 1) - 1))
    parser.add_argument("--device", default="cuda", help="cpu tries the script out")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device: nothing is measured.", file=sys.stderr)
        return 1
    steps = 50 * (NUM_WARM + 1 if options.quick else NUM_LINES)
    rounds = 1 if options.quick else 3
    with tempfile.TemporaryDirectory() as folder:
        from ensemble_kit.data.synthetic import synthesize

        num_videos = {"train": 256 if options.quick else 2048}
        synthesize(Path(folder), num_videos=num_videos, num_shards=16, **SIZE)
        data = str(Path(folder) / "train")
        work = {
            f"{recipe}, batch {batch_size}: {variant}": partial(
                alone, train, recipe, batch_size, steps, data, options.workers, options.device,
                variant,
            )
            for recipe in options.recipes
            for batch_size in options.batch_size or BATCH_SIZES
            for variant in VARIANTS
        }  # fmt: skip
        needed = {recipe: alone(work_of, recipe, data) for recipe in options.recipes}
        found = in_turn(work, rounds=rounds)
    limits = alone(ceilings, options.device)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    about = f"{card}; {machine()}; {versions('torch', 'numpy')[0]}; {options.workers} workers"
    speeds = {name: figures["examples_per_second"] for name, figures in found.items()}
    ratios = {name: ratio(values, speeds[name.rpartition(":")[0] + ": fp32"])
              for name, values in speeds.items()}  # fmt: skip
    if options.as_json:
        print_json(ratios=ratios, machine=about, figures=found, needed=needed, ceilings=limits)
        return 0
    print(f"{about}\nceilings: {limits['fp32'] / 1e12:.1f} TFLOP/s in fp32, "
          f"{limits['bf16'] / 1e12:.1f} in bf16; {limits['bytes'] / 1e9:,.0f} GB/s")  # fmt: skip
    rows = []
    for name, figures in found.items():
        recipe, variant = name.partition(",")[0], name.rpartition(": ")[2]
        achieved = median(speeds[name]) * needed[recipe]["flops"]
        batch_size = int(name.rpartition(":")[0].rpartition(" ")[2])
        moved = median(speeds[name]) / batch_size * needed[recipe]["weights"] * STEP_BYTES
        rows.append([
            name, spread(speeds[name], digits=0), f"{ratios[name]:.2f}x",
            f"{median(figures['data_wait']):.1%}", f"{achieved / 1e12:.1f}",
            f"{achieved / limits[variant.partition(',')[0]]:.0%}",
            f"{moved / 1e9:,.0f}", f"{moved / limits['bytes']:.0%}",
            f"{median(figures['gpu_bytes']) / 2**30:.1f}",
        ])  # fmt: skip
    columns = ["run", "examples/s", "of fp32", "waiting", "TFLOP/s", "of ceiling",
               "GB/s at least", "of ceiling", "GPU GiB"]  # fmt: skip
    print_table(columns, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
