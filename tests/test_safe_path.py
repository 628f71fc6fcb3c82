"""Python files in the current folder are not run in place of modules."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import contents_of

# What the kit, PyTorch or NumPy import: each name was found in `sys.modules` of a training run.
NAMES = ["pickle", "mmap", "queue", "struct", "tempfile", "typing_extensions", "click", "numpy"]


@pytest.fixture
def trap(own_workspace):
    """The current folder, in which each of some modules writes down that it was run."""
    for name in NAMES:
        code = f"open({str(own_workspace.path / 'run.txt')!r}, 'a').write({name + ' '!r})\n"
        (own_workspace.path / f"{name}.py").write_text(code)
    return own_workspace.path


def train(how, folder, *options, name="new", recipe="recipes/mean.toml", **variables):
    words = ["train", recipe, "--train", "data/train/*.tfrecord", "--name", name,
             "--set", "training.max_steps=2", "--set", "training.checkpoint_every=2",
             *options]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= variables
    return subprocess.run(
        [*how, *words], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("python -m", ["--workers", "1"]),
        ("command", ["--jobs", "1", "--workers", "1"]),  # both ways start jobs by the same line
    ],
)
def test_training_runs_no_file_of_the_current_folder(options, way, trap):
    script = Path(sys.executable).parent / "ensemble-kit"
    if way == "command" and not script.is_file():
        pytest.skip("the command is not installed beside this Python")
    how = [script] if way == "command" else [sys.executable, "-m", "ensemble_kit"]

    result = train(how, trap, *options)

    assert result.returncode == 0, result.stderr
    assert not (trap / "run.txt").exists(), (trap / "run.txt").read_text()


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_model_trains_like_any_other_and_compiling_runs_no_file_either(trap, tmp_path):
    how = [sys.executable, "-m", "ensemble_kit"]
    cache = tmp_path / "inductor"

    options = {"recipe": "demo/average-moe"}
    rate = ["--set", "training.learning_rate=0.02"]

    compiled = train(how, trap, "--compile", *rate, **options, TORCHINDUCTOR_CACHE_DIR=str(cache))
    eager = train(how, trap, *rate, **options, name="eager")

    assert (compiled.returncode, eager.returncode) == (0, 0), compiled.stderr + eager.stderr
    assert list(cache.rglob("*.so"))  # inductor has made code of it
    assert not (trap / "run.txt").exists(), (trap / "run.txt").read_text()
    weights = [
        contents_of(trap / "runs" / name / "checkpoints" / "step-00000002.safetensors")
        for name in ("new", "eager")
    ]
    losses = [
        json.loads((trap / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("new", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32 sums in another order
    for name, tensor in weights[1].items():
        # two of Adam's steps of 0.02 each, whose sign is that of a gradient that may be near 0
        torch.testing.assert_close(weights[0][name], tensor, rtol=0, atol=0.08)
        assert (weights[0][name] - tensor).abs().median() < 1e-5


def test_processes_that_read_for_a_script_run_no_file_either(trap):
    code = (
        "from ensemble_kit import Records\n"
        "batches = Records(['data/train']).training_batches(4, seed=0, workers=1)\n"
        "print(len(next(batches).ids))\n"
    )

    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=trap
    )

    assert result.stdout == "4\n", result.stderr
    assert not (trap / "run.txt").exists(), (trap / "run.txt").read_text()
