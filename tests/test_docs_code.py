"""Every block of code in the README and in docs/ runs, here or elsewhere, or says why not."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from ensemble_kit.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
CODE = {"bash", "python", "sh"}  # other blocks are TOML, YAML and what commands print

README_TEST = "tests/test_readme.py runs it"
TRAINING = "it trains the papers' networks; tests/cli runs such commands on small ones"
NETWORK = "it needs the network"
MACHINES = (
    "it needs several GPUs or machines; tests/test_job_scripts.py and tests/engines run smaller"
)
OWN_PARTS = "it leaves places for one's own code; tests/networks/test_own_parts.py runs such a part"
SEGMENTS = "ensemble-kit predict ensemble/ensemble.onnx 'test/*.tfrecord' --segments"
# Blocks that do not run here: their page, how they begin, and where they run or why they do not.
ELSEWHERE = [
    ("README.md", "pip install -c constraints.txt -e . &&", ".ci/run runs it"),
    ("README.md", "pip install -c constraints.txt -e '.[test]'", ".ci/run runs it"),
    ("README.md", "ensemble-kit data info", TRAINING),
    ("README.md", "import numpy as np", README_TEST),
    ("README.md", "from pathlib import Path", README_TEST),
    ("README.md", "ensemble-kit recipes list", TRAINING),
    ("docs/foreign-models.md", "ensemble-kit import-onnx", "tests/foreign runs such"),
    ("docs/more-than-one-machine.md", "ensemble-kit predict", "tests/test_shards.py runs such"),
    ("docs/more-than-one-machine.md", "#!/bin/bash", MACHINES),
    ("docs/more-than-one-machine.md", "export RAY_AUTH_MODE", MACHINES),
    ("docs/more-than-one-machine.md", "ensemble-kit train", MACHINES),
    ("docs/own-parts.md", "class SmoothMaximum", OWN_PARTS),
    ("docs/own-parts.md", "from ensemble_kit.testing", OWN_PARTS),
    ("docs/own-parts.md", "ensemble-kit recipes check", OWN_PARTS),
    ("docs/paper_tables.md", "pip install", "hours; tests/test_paper_tables.py runs a short trial"),
    ("docs/predictions.md", SEGMENTS, "tests/cli/test_predict.py runs such"),
    ("docs/predictions.md", "ensemble-kit select validate/gru.csv", "tests/predictions runs such"),
    ("docs/records.md", "from pathlib import Path", README_TEST),
    ("docs/records.md", "ensemble-kit data convert", README_TEST),
    ("docs/records.md", "ensemble-kit data download", NETWORK),
    ("docs/records.md", "ensemble-kit train willow/gru --train 's3:", NETWORK),
    ("docs/selection.md", "ensemble-kit train ... --predict-dtype", TRAINING),
    ("docs/selection.md", "for fold in 1 2 3", TRAINING),
    ("docs/serving.md", "pip install numpy onnxruntime", "tests/test_packaging.py installs it"),
    ("docs/serving.md", "ensemble-kit fuse", "tests/cli/test_fuse.py runs such"),
    ("docs/serving.md", "ensemble-kit export-onnx", "tests/export runs each of these options"),
    ("docs/serving.md", "pip install 'ensemble-kit[hub]'", NETWORK),
    ("docs/serving.md", 'ensemble = OnnxEnsemble("hf:', "tests/serving/test_hub.py has such a Hub"),
    ("docs/predictions.md", "for run in runs", "a loop over what tests/cli/test_predict.py runs"),
    ("docs/training.md", "ensemble-kit train", TRAINING),
    ("docs/training.md", "ensemble-kit average", "tests/cli/test_average.py runs such"),
    ("docs/training.md", "torchrun", MACHINES),
    ("docs/training.md", "ensemble-kit predict", TRAINING),
]  # fmt: skip
# Names that stand in the pages for a reader's own, and what the workspace of the tests has.
NAMES = {
    "runs/gru": "runs/rnn", "--start nonlocal-gru": "--start rnn",
    "--exclude poor": "--exclude bag", "--weight gru": "--weight rnn", "1024": "7", "128": "3",
}  # fmt: skip


def blocks():
    """Yield the language, the page and the text of each block that is code."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S):
            if language in CODE:
                yield language, page, block


def is_elsewhere(page, block):
    return any(page == each and block.lstrip().startswith(start) for each, start, _ in ELSEWHERE)


HERE = [(kind, block) for kind, page, block in blocks() if not is_elsewhere(page, block)]
PYTHON = [block for kind, block in HERE if kind == "python"]
COMMANDS = [block for kind, block in HERE if kind != "python"]


def test_every_block_that_is_said_to_run_elsewhere_is_there():
    for page, start, reason in ELSEWHERE:
        assert any(page == each and block.lstrip().startswith(start) for _, each, block in blocks())
        assert reason
    assert len(COMMANDS) >= 9
    assert len(PYTHON) >= 4


@pytest.fixture
def workspace_as_shown(own_workspace, exported, own_ensemble, monkeypatch):
    """The workspace with what the pages take for granted; what exists is replaced."""
    for part in (own_workspace.path / "data").iterdir():  # splits, and their schema
        (own_workspace.path / part.name).symlink_to(part)
    rows = ["VideoId,LabelConfidencePairs", "v,0 0.9 1 0.5", "w,1 0.7"]
    for name in ("a", "b"):
        (own_workspace.path / f"{name}.csv").write_text("\n".join(rows) + "\n")
    (own_workspace.path / "labels.csv").write_text("VideoId,Labels\nv,0\nw,0 1\n")
    for command in ("SELECT", "REPORT", "PREDICT", "CALIBRATE"):
        monkeypatch.setenv(f"ENSEMBLE_KIT_{command}_FORCE", "1")
    return own_workspace


def renamed(block):
    for name, ours in NAMES.items():
        block = block.replace(name, ours)
    return block


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.splitlines()[0][:60])
def test_the_commands_of_a_block_run_one_after_the_other(block, workspace_as_shown, runner):
    for line in renamed(block).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)[1:]
        result = runner.invoke(main, words)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_python_of_the_pages_runs(workspace_as_shown, runner):
    ensemble = "ensemble/ensemble.onnx"
    predicted = ["predict", ensemble, "validate/*.tfrecord", "-o", "ensemble/p.safetensors"]
    calibrated = ["calibrate", ensemble, "ensemble/p.safetensors", "-o", "ensemble/calibrated.onnx"]
    for words in (predicted, calibrated):
        result = runner.invoke(main, words)
        assert result.exit_code == 0, result.output
    rgb, audio = (np.zeros((12, width), np.uint8) for width in (7, 3))
    names = {"rgb": rgb, "audio": audio}

    for block in sorted(PYTHON, key=lambda block: not block.startswith("import")):
        exec(compile(renamed(block), block.splitlines()[0], "exec"), names)

    assert names["tags"].labels.shape[0] == 1
