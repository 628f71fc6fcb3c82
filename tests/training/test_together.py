import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import contents_of, interrupt_after, tiny_recipe_text, tiny_records
from together import RECIPES, train_in_double

from ensemble_kit.store.run_log import read_metrics
from ensemble_kit.store.workspace import RunFolder

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of one process, the same runs of two, and what those printed.

    One of the runs is what two processes have made of what one had begun.
    """
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    tiny_records(alone / "records", num_videos=50)
    (together / "records").symlink_to(alone / "records")
    (together / "tiny.toml").write_text(tiny_recipe_text(pooling="average", max_steps=4))
    for name in RECIPES:
        train_in_double(alone, name)
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(patched, 13)
        train_in_double(together, "resumed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, TESTS / "training" / "together.py", together],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return alone, together, result.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_with_half_the_batch_each_train_as_one_with_all_of_it(name, trained):
    alone, together = (RunFolder(folder / name) for folder in trained[:2])

    for path in ("ema.safetensors", "checkpoints/step-00000020.safetensors"):
        one, two = contents_of(alone.path / path), contents_of(together.path / path)
        assert one.keys() == two.keys()
        for tensor in one:
            assert one[tensor].dtype == torch.float64
            torch.testing.assert_close(two[tensor], one[tensor], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_what_two_processes_measure_is_what_one_does(name, trained):
    told = {"step", "examples", "epoch", "loss", "validation"}
    alone, together = (
        [
            {key: value for key, value in line.items() if key in told}
            for line in read_metrics(folder / name / "metrics.jsonl")
            if "state" not in line
        ]
        for folder in trained[:2]
    )

    assert len(alone) == 3
    for one, two in zip(alone, together, strict=True):
        assert two.pop("loss", 0) == pytest.approx(one.pop("loss", 0))
        assert two == one


def test_the_command_writes_and_prints_once(trained):
    folder, printed = trained[1:]

    assert re.fullmatch(
        r"runs/tiny: 4 steps in \d+\.\d s, validation GAP@20 0\.\d{4} \(.*\)\n", printed
    )
    assert sorted(path.name for path in (folder / "runs" / "tiny").glob("*.*")) == [
        ".lock",
        "averaged.safetensors",
        "metrics.jsonl",
        "state.safetensors",
        "validation.safetensors",
    ]
