"""`train --jobs`: runs side by side, in real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workspace_fixture import TRAINING

from ensemble_kit.cli import main
from ensemble_kit.store.workspace import RunFolder

PATIENCE = 200  # seconds until two processes have imported PyTorch and trained some steps


def test_one_recipe_that_fails_does_not_stop_the_rest(runner, own_workspace):
    bad = (own_workspace.path / "recipes" / "mean.toml").read_text()
    bad = re.sub(r"learning_rate = .*", "learning_rate = 1e30", bad)
    (own_workspace.path / "recipes" / "bad.toml").write_text(bad)
    options = ["--set", "training.max_steps=8", "-o", "elsewhere", "--jobs", "1", "--quiet"]

    result = runner.invoke(
        main, ["train", "recipes/bad.toml", "recipes/mean.toml", *TRAINING, *options]
    )

    assert result.exit_code == 1
    assert re.fullmatch(r"elsewhere/mean: 8 steps in .*\n", result.stdout)
    (problem,) = re.findall(r"^bad: failed: (elsewhere/bad: .* at step .*)$", result.stderr, re.M)
    assert result.stderr.endswith(
        f"Error: 1 of 2 jobs failed:\n  bad: {problem}\n"
        "Fix this and give the same command again; what is finished is left as it is.\n"
    )
    assert (own_workspace.path / "elsewhere" / "mean" / "validation.safetensors").exists()


def test_an_index_trains_that_recipe_alone(runner, own_workspace, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "ensemble_kit.cli.train._train_one",
        lambda plan, *_, **__: trained.append(plan.run.name),
    )
    words = ["train", "recipes/mean.toml", "recipes/bag.toml", *TRAINING, "-o", "elsewhere"]

    second = runner.invoke(main, [*words, "--index", "2"])
    third = runner.invoke(main, [*words, "--index", "3"])
    of_one = runner.invoke(main, ["train", words[1], *words[3:], "--index", "2"])

    assert (second.exit_code, trained) == (0, ["bag"])
    assert third.exit_code == 2
    assert third.stderr.endswith("Error: --index is 3, but the command names 2 recipes.\n")
    assert of_one.stderr.endswith("Error: --index is 2, but the command names 1 recipe.\n")


@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_cluster_may_have_gpus_that_this_machine_lacks(
    runner, own_workspace, monkeypatch, command
):
    jobs = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        f"ensemble_kit.cli.{command}.run_side_by_side",
        lambda given, *_, **__: jobs.extend(given),
    )
    words = {
        "train": ["train", "recipes/mean.toml", *TRAINING, "-o", "elsewhere"],
        "predict": ["predict", str(own_workspace.averaged("mean")), "data/validate", "-o", "p/"],
    }[command] + ["--on", "auto", "--device", "cuda"]

    unasked = runner.invoke(main, words)
    asked = runner.invoke(main, [*words, "--gpus-each", "1"])

    assert unasked.exit_code == 2
    assert "Error: With --on, --device cuda needs --gpus-each: " in unasked.stderr
    assert asked.exit_code == 0, asked.stderr
    assert jobs
    assert all("--device=cuda" in job.words for job in jobs)


@pytest.fixture
def process(own_workspace):
    """A real process that trains two runs for longer than any test waits, and would a third."""
    recipes = [f"recipes/{name}.toml" for name in ("mean", "bag", "rnn")]
    options = ["--set", "training.max_steps=10_000_000", "-o", "elsewhere", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemble_kit", "train", *recipes, *TRAINING[:2], *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=own_workspace.path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        process_group=0,
    )
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_ends_all_runs_in_their_own_way(process, own_workspace):
    runs = [own_workspace.path / "elsewhere" / name for name in ("mean", "bag")]
    wait_for_checkpoints(process, runs)

    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    stdout, stderr = process.communicate(timeout=PATIENCE)

    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert stderr.endswith("Stopped; the same command resumes: mean, bag, rnn.\n")
    for run in runs:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["state"] == "stopped"
        assert f"elsewhere/{run.name}: stopped at step {last['step']};" in stderr
        assert (run / "checkpoints" / f"step-{last['step']:08d}.safetensors").exists()
    assert not (own_workspace.path / "elsewhere" / "rnn").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_runs_stop_when_the_command_that_started_them_is_killed(process, own_workspace, runner):
    runs = [own_workspace.path / "elsewhere" / name for name in ("mean", "bag")]
    wait_for_checkpoints(process, runs)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2

    process.kill()

    until = time.monotonic() + PATIENCE
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < until
        time.sleep(0.05)
    for run in runs:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["state"] == "stopped"
        with RunFolder(run).locked():  # nobody trains it any more
            pass


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_checkpoints(process, runs):
    until = time.monotonic() + PATIENCE
    while not all(list(run.glob("checkpoints/step-*")) for run in runs):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_jobs_are_not_for_torchrun(runner, own_workspace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, "--jobs", "2"])

    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: --jobs starts processes itself; leave it or torchrun out.\n"
    )
