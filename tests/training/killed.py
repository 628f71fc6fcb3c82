"""Train runs that are killed at chosen moments, and print what became of them. A script.

    python killed.py FOLDER NUM_RUNS

Python and torch are started once; each run is a fork that SIGKILL ends at another moment. A
moment is a call that touches the disk, takes a step or writes a tensor.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from builders import tiny_recipe, tiny_records

from ensemble_kit.store import tensor_files as checkpoints
from ensemble_kit.training import loop, train_checkpoints
from ensemble_kit.training.plan import RunPlan

ON_DISK = {"open", "os.remove", "os.rename", "os.truncate"}
RECIPE = tiny_recipe(
    max_steps=7, checkpoint_every=2, overrides=["hidden.dropout=0.3"]  # so that steps draw
)  # fmt: skip


def plan_of(folder, records):
    training, validation = records
    return RunPlan(recipe=RECIPE, training=training, validation=validation, folder=folder, ema=0.9)


def train(folder, records, *, killed_at=None):
    """Train in another process; return how many moments it had, or None if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with open(reading) as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or status == 0, "training failed"
        assert os.WIFSIGNALED(status) == (not said)
        return int(said) if said else None
    moments = 0

    def count(*_):
        nonlocal moments
        moments += 1
        if moments == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*arguments):
            count()
            return function(*arguments)

        return call

    loop.seed_step = counted(loop.seed_step)
    checkpoints._as_bytes = counted(checkpoints._as_bytes)
    os.fsync = counted(os.fsync)
    sys.addaudithook(lambda event, _: count() if event in ON_DISK else None)
    code = 1
    try:
        train_checkpoints(plan_of(folder, records))
        os.write(writing, str(moments).encode())
        code = 0
    finally:
        os._exit(code)


def contents(run):
    """Return all that must not depend on whether the run was killed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with checkpoints.open_tensors(run / "state.safetensors") as file:
        metadata = dict(file.metadata)
    del metadata["seconds"]
    return {
        "metadata": metadata,
        "lines": [[line.get(key) for key in ("step", "loss", "validation")] for line in lines],
        "files": {
            str(path.relative_to(run)): path.read_bytes().hex()
            for path in run.rglob("*.safetensors")
            if path.name != "state.safetensors"
        },
        "others": sorted(path.name for path in run.rglob("*.part")),
    }


def main(folder, num_runs):
    torch.set_num_threads(1)
    records = tiny_records(folder / "records", num_videos=32)
    train_checkpoints(
        plan_of(folder / "first" / "tiny", records)
    )  # so that what is imported late is there before the forks
    moments = train(folder / "whole" / "tiny", records)
    whole = contents(folder / "whole" / "tiny")
    chosen = random.Random(0)
    kills = 0
    for number in range(num_runs):
        run = folder / str(number) / "tiny"
        first = 1 + number * moments // num_runs + chosen.randrange(moments // num_runs)
        again = chosen.randrange(1, moments)
        kills += train(run, records, killed_at=first) is None
        kills += train(run, records, killed_at=again) is None
        train(run, records)
        if contents(run) != whole:
            print(f"killed at moments {first} and {again} of {moments}: another end")
    print(f"{kills} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
