"""Python files in the current folder are not run in place of modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What the kit, PyTorch or NumPy import: each name was found in `sys.modules` of a training run.
NAMES = ["pickle", "mmap", "queue", "struct", "tempfile", "typing_extensions", "click", "numpy"]


@pytest.fixture
def trap(own_workspace):
    """The current folder, in which each of some modules writes down that it was run."""
    for name in NAMES:
        code = f"open({str(own_workspace.path / 'run.txt')!r}, 'a').write({name + ' '!r})\n"
        (own_workspace.path / f"{name}.py").write_text(code)
    return own_workspace.path


def train(how, folder, *options):
    words = ["train", "recipes/mean.toml", "--train", "data/train/*.tfrecord", "--name", "new",
             "--set", "training.max_steps=2", *options]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*how, *words], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.mark.parametrize("options", [["--workers", "1"], ["--jobs", "1"]])
@pytest.mark.parametrize("way", ["command", "python -m"])
def test_training_runs_no_file_of_the_current_folder(options, way, trap):
    script = Path(sys.executable).parent / "ensemble-kit"
    if way == "command" and not script.is_file():
        pytest.skip("the command is not installed beside this Python")
    how = [script] if way == "command" else [sys.executable, "-m", "ensemble_kit"]

    result = train(how, trap, *options)

    assert result.returncode == 0, result.stderr
    assert not (trap / "run.txt").exists(), (trap / "run.txt").read_text()
