"""Train runs in all the processes that torchrun has started. A script.

    torchrun --nproc-per-node 2 together.py FOLDER

FOLDER holds ``records`` and ``tiny.toml``; each of ``RECIPES`` becomes a run in it, as does the
command ``train tiny.toml``.
"""

import contextlib
import sys
from functools import partial
from pathlib import Path

import torch
from builders import tiny_recipe, train_tiny

from ensemble_kit.cli import main
from ensemble_kit.data.dataset import Records
from ensemble_kit.training import loop
from ensemble_kit.training.validation import measure_together

SCHEDULE = {"batch_size": 15, "max_steps": 20, "checkpoint_every": 10, "l2_penalty": 0.01}
PENALTY = "fusion={name='projection', size=3, penalty=2.0}"
RECIPES = {  # 15 videos are not to be halved
    "batch-norm": tiny_recipe(pooling="netvlad", probability_gating=True, **SCHEDULE),
    "whitening": tiny_recipe(pooling="second_order", sampling="all", **SCHEDULE),
    "resumed": tiny_recipe(pooling="soft_bof", overrides=[PENALTY], **SCHEDULE),
}


def train_in_double(folder, name):
    """Train one of the recipes in float64, so that no rounding hides what differs."""
    torch.set_default_dtype(torch.float64)
    try:
        records = tuple(Records([folder / "records" / part]) for part in ("train", "validate"))
        return train_tiny(folder / name, records, RECIPES[name], is_validated=True, ema=0.9)
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.measure_together = partial(
        measure_together, batch_size=9
    )  # so that there is more than one batch to share
    for run in RECIPES:
        train_in_double(Path(sys.argv[1]), run)
    with contextlib.chdir(sys.argv[1]):
        main(
            ["train", "tiny.toml", "--train", "records/train", "--validation", "records/validate"],
            standalone_mode=False,
        )
