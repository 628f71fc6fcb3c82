import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from workspace_fixture import MEMBERS, TRAINING

from ensemble_kit.cli import main
from ensemble_kit.data.dataset import Records
from ensemble_kit.recipes import reading
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.tensor_files import open_tensors

SHORT = ["--set", "training.max_steps=2"]
LONG = [
    "--set", "training.max_steps=10_000_000", "--set", "training.checkpoint_every=20",
    "--name", "long",
]  # fmt: skip


def metadata_of(path):
    with open_tensors(path) as file:
        return file.metadata_as(CheckpointMetadata)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 0x40  # the last record's payload
    path.write_bytes(content)


def test_every_recipe_becomes_a_run_of_its_name(workspace):
    lines = workspace.trained.stdout.splitlines()

    assert len(lines) == len(MEMBERS)
    for line, name in zip(lines, MEMBERS, strict=True):
        assert re.fullmatch(
            rf"runs/{name}: 24 steps in \d+\.\d s, "
            r"validation GAP@20 0\.\d{4} \((the mean of 3 checkpoints|checkpoint \d+ alone.*); "
            r"best single checkpoint 0\.\d{4}\)",
            line,
        )
        files = sorted(
            str(path.relative_to(workspace.path / "runs" / name))
            for path in (workspace.path / "runs" / name).rglob("[!.]*.*")
        )
        assert files == [
            "averaged.safetensors",
            *(f"checkpoints/step-000000{step}.safetensors" for step in ("06", "12", "18", "24")),
            "metrics.jsonl",
            "state.safetensors",
            "validation.safetensors",
        ]
        assert metadata_of(workspace.averaged(name)).name == name


@pytest.fixture
def shipped(own_workspace, monkeypatch):
    """Let the kit ship the workspace's recipes as ``paper/...``, and an ensemble of two."""
    folder = own_workspace.path / "shipped" / "models" / "paper"
    folder.mkdir(parents=True)
    for name in MEMBERS:
        shutil.copy(own_workspace.path / "recipes" / f"{name}.toml", folder)
    (folder / "ensembles.toml").write_text(
        '[source]\npaper = "A paper"\n'
        '[ensembles.pair]\ntitle = "Two"\nmembers = ["paper/mean", "paper/bag"]\n'
        'mixing = "uniform"\nreported = [{ gap_at_20 = 0.5, split = "test" }]\n'
        '[ensembles.many]\ntitle = "Many"\nnum_members = 25\n'
        'reported = [{ gap_at_20 = 0.6, split = "test" }]\n'
    )
    monkeypatch.setattr(reading, "files", lambda _: own_workspace.path / "shipped")


def test_the_members_of_an_ensemble_become_runs_beside_recipes_given_by_name(runner, shipped):
    words = ["paper/bag", "recipes/rnn.toml", "--ensemble", "paper/pair", *TRAINING, *SHORT]

    result = runner.invoke(main, ["train", *words, "-o", "elsewhere", "--quiet"])

    assert result.exit_code == 0, result.output
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "elsewhere/paper-bag", "elsewhere/rnn", "elsewhere/paper-mean",
    ]  # fmt: skip


def test_jobs_are_told_of_their_recipe_and_not_of_the_ensemble(runner, shipped, monkeypatch):
    jobs = []
    monkeypatch.setattr(
        sys.modules["ensemble_kit.cli.train"],
        "run_side_by_side",
        lambda given, *_, **__: jobs.extend(given),
    )

    words = ["--ensemble", "paper/pair", *TRAINING, *SHORT, "--jobs", "2"]
    assert runner.invoke(main, ["train", *words]).exit_code == 0

    assert [job.words[-2:] for job in jobs] == [("--", "paper/mean"), ("--", "paper/bag")]
    assert not any("ensemble" in word for job in jobs for word in job.words)


def test_an_ensemble_that_is_unknown_or_unnamed_is_refused(runner, shipped):
    def refused(*words):
        result = runner.invoke(main, ["train", *words, *TRAINING])
        assert result.exit_code == 1
        return result.stderr

    assert refused("--ensemble", "paper/pairs") == (
        "Error: There is no ensemble 'paper/pairs' (did you mean 'paper/pair'?).\n"
        "List the ensembles with `ensemble-kit recipes list --ensembles`.\n"
    )
    assert refused("--ensemble", "paper/many") == (
        "Error: The source of ensemble paper/many does not say which its 25 members are.\n"
        "Choose another ensemble of `ensemble-kit recipes list --ensembles`, or name recipes.\n"
    )
    result = runner.invoke(main, ["train", *TRAINING])
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Give a RECIPE, or --ensemble NAME.\n")


def test_progress_and_results_do_not_mix(workspace):
    assert [line.split(":")[0] for line in workspace.trained.stderr.splitlines()] == list(MEMBERS)


def test_quiet_training_prints_its_result_alone(runner, own_workspace):
    words = ["train", "recipes/mean.toml", *TRAINING, *SHORT, "--name", "new", "--quiet"]

    result = runner.invoke(main, [*words, "--tracker", "tensorboard"])

    assert result.stdout.startswith("runs/new: 2 steps in ")
    assert result.stderr == ""
    assert (own_workspace.path / "runs" / "new" / "tensorboard").is_dir()


def test_the_gap_it_prints_is_that_of_the_validation_predictions(workspace, runner):
    for line in workspace.trained.stdout.splitlines():
        path = workspace.path / line.split(":")[0] / "validation.safetensors"
        found = json.loads(runner.invoke(main, ["evaluate", str(path), "--json"]).stdout)
        assert f", validation GAP@20 {found['gap']:.4f} (" in line


def test_a_run_may_have_another_name_values_and_seed(runner, own_workspace):
    options = ["--name", "other", "--seed", "7", "--set", "head.num_experts=3", *SHORT]

    result = runner.invoke(main, ["train", "recipes/rnn.toml", *TRAINING, *options])

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("runs/other: 2 steps in ")
    metadata = metadata_of(own_workspace.averaged("other"))
    assert (metadata.name, metadata.seed, metadata.step) == ("other", 7, 2)
    assert metadata.recipe.overrides == ("head.num_experts=3", "training.max_steps=2")


def test_a_shipped_recipe_is_named_by_its_folder_too(runner, own_workspace):
    only = TRAINING[:2]  # without validation records

    result = runner.invoke(main, ["train", "demo/average-moe", *only, *SHORT, "-o", "elsewhere"])

    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"elsewhere/demo-average-moe: 2 steps in \d+\.\d s\n", result.stdout)
    folder = own_workspace.path / "elsewhere" / "demo-average-moe"
    assert (folder / "averaged.safetensors").exists()
    assert not (folder / "validation.safetensors").exists()


def test_the_number_of_processes_that_read_is_the_reader_s(runner, own_workspace, monkeypatch):
    asked = []
    whole = Records.training_batches

    def training_batches(self, *arguments, **options):
        asked.append(options.get("workers"))
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Records, "training_batches", training_batches)
    options = ["--name", "new", "--workers", "1"]

    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING[:2], *SHORT, *options])

    assert result.exit_code == 0, result.output
    assert asked[0] == 1


def test_one_name_cannot_be_two_runs(runner, own_workspace):
    result = runner.invoke(
        main, ["train", "recipes/rnn.toml", "recipes/bag.toml", *TRAINING, "--name", "both"]
    )

    assert result.exit_code == 2
    assert result.stderr.endswith("Error: --name names one run; give one RECIPE with it.\n")
    assert not (own_workspace.path / "runs" / "both").exists()


def test_two_recipes_of_one_name_are_refused_before_either_is_trained(runner, own_workspace):
    (own_workspace.path / "new.toml").write_text(
        (own_workspace.path / "recipes" / "rnn.toml").read_text()
    )

    result = runner.invoke(main, ["train", "new.toml", "./new.toml", *TRAINING])

    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: Two recipes would make the run runs/new; train one by itself, with --name.\n"
    )
    assert not (own_workspace.path / "runs" / "new").exists()


def test_another_run_that_is_there_is_refused_before_any_is_trained(runner, own_workspace):
    (own_workspace.path / "new.toml").write_text(
        (own_workspace.path / "recipes" / "rnn.toml").read_text()
    )
    recipes = ["new.toml", "recipes/bag.toml"]

    result = runner.invoke(main, ["train", *recipes, *TRAINING, "--seed", "1"])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: runs/bag holds a run with other values of: seed.\n"
        "Give this run another --name, or replace the old one with --force.\n"
    )
    assert not (own_workspace.path / "runs" / "new").exists()


def test_a_finished_run_is_skipped_with_a_line(runner, own_workspace):
    lines = own_workspace.trained.stdout.splitlines()
    line = lines[list(MEMBERS).index("bag")]

    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING])

    assert result.exit_code == 0, result.output
    assert result.stdout == line.replace(": ", ": was already finished: ", 1) + "\n"

    as_json = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, "--json"])

    found = json.loads(as_json.stdout)
    assert (found["run"], found["was_finished"], found["steps"]) == ("runs/bag", True, 24)
    assert f"GAP@20 {found['gap']:.4f} ({found['averaged']}; " in line
    assert line.endswith(f"best single checkpoint {found['best_checkpoint_gap']:.4f})")
    assert result.stderr == ""


def test_a_run_killed_after_its_last_step_is_averaged_and_predicted(runner, own_workspace):
    folder = own_workspace.path / "runs" / "bag"
    averaged = (folder / "averaged.safetensors").read_bytes()
    predicted = (folder / "validation.safetensors").read_bytes()
    (folder / "averaged.safetensors").unlink()
    (folder / "validation.safetensors").unlink()

    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING])

    assert result.exit_code == 0, result.output
    assert (folder / "averaged.safetensors").read_bytes() == averaged
    assert (folder / "validation.safetensors").read_bytes() == predicted


def test_force_replaces_a_run(runner, own_workspace):
    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, *SHORT, "--force"])

    assert result.exit_code == 0, result.output
    checkpoints = own_workspace.path / "runs" / "bag" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002.safetensors"]


def test_a_bad_recipe_is_refused_before_a_good_one_is_trained(runner, own_workspace):
    options = ["--set", "head.num_expert=3", "-o", "elsewhere"]

    result = runner.invoke(
        main, ["train", "recipes/bag.toml", "recipes/rnn.toml", *TRAINING, *options]
    )

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Recipe bag: head.num_expert is not a key of the part 'mixture_of_experts' (did you "
        "mean 'num_experts'?).\n"
        "Use one of the keys: name, num_experts, gate_rank, probability_gating, remove_diagonal.\n"
    )
    assert not (own_workspace.path / "elsewhere").exists()


def test_a_recipe_past_the_memory_is_refused_and_leaves_nothing(runner, own_workspace, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 2**15)  # pages, and bytes of a page: 1 GiB
    options = ["--set", "head.num_experts=1_000_000", "-o", "elsewhere/runs"]

    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, *options])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Recipe bag takes at least 1.2 GiB of memory in training; this machine has 1.0 GiB."
        "\nUse smaller sizes, or train on a machine with more memory.\n"
    )
    assert not (own_workspace.path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["a b", "../x", "a/b", ".", "..", "", "-x", "/tmp/x"])
def test_a_name_that_no_folder_should_have_is_refused(name, runner, own_workspace):
    before = sorted(own_workspace.path.rglob("*"))

    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, f"--name={name}"])

    assert result.exit_code == 1
    assert sorted(own_workspace.path.rglob("*")) == before
    assert result.stderr == (
        f"Error: {name!r} cannot name a run.\n"
        "Use at most 200 letters, digits, _ and -, and do not begin with -.\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(runner, own_workspace):
    options = ["--device", "cuda", "--name", "fast"]

    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, *options])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: PyTorch finds no CUDA device.\n"
        "Use --device cpu, or install a driver and a PyTorch built for CUDA.\n"
    )


def test_records_are_not_optional(runner, own_workspace):
    result = runner.invoke(main, ["train", "recipes/bag.toml"])

    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Missing option '--train'.\n")


def test_skipped_records_are_counted_at_the_end(runner, own_workspace):
    damage(own_workspace.path / "data" / "train" / "train0001.tfrecord")
    damage(own_workspace.path / "data" / "validate" / "validate0000.tfrecord")
    options = ["--name", "new", "--skip-bad-records", *SHORT]

    refused = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, "--name", "old"])
    result = runner.invoke(main, ["train", "recipes/bag.toml", *TRAINING, *options])

    assert refused.exit_code == 1
    assert " bytes differ from their checksum.\n" in refused.stderr
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1] == "2 bad records were skipped."


@pytest.fixture
def process(own_workspace):
    """A real process that trains for longer than any test waits."""
    words = ["train", "recipes/mean.toml", *TRAINING[:2], *LONG]
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemble_kit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=own_workspace.path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    yield process
    process.kill()
    process.communicate()


def test_a_signal_to_a_process_leaves_a_run_that_average_and_predict_accept(
    process, runner, own_workspace
):
    run = own_workspace.path / "runs" / "long"
    until = time.monotonic() + 60
    while len(list(run.glob("checkpoints/step-*"))) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)

    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=10)  # a scheduler gives 30 or more

    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    require_usable(runner, run, stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_so_does_every_other_signal(number, runner, own_workspace, monkeypatch):
    whole = Records.training_batches

    def training_batches(*arguments, **options):
        for step, batch in enumerate(whole(*arguments, **options)):
            if step == 65:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(Records, "training_batches", training_batches)

    result = runner.invoke(main, ["train", "recipes/mean.toml", *TRAINING[:2], *LONG])

    assert (result.exit_code, result.stdout) == (130, "")
    require_usable(runner, own_workspace.path / "runs" / "long", result.stderr)


def require_usable(runner, run, stderr):
    """Require that a run was stopped in an orderly way, and that the next commands take it."""
    said = re.search(
        r"runs/long: stopped at step (\d+); the same command resumes it\.\n"
        r"Use its checkpoints so far with `ensemble-kit average runs/long`\.\n\Z",
        stderr,
    )
    assert said, stderr
    last = max(run.glob("checkpoints/*"))
    assert last.name == f"step-{int(said[1]):08d}.safetensors"
    assert not (run / "averaged.safetensors").exists()
    averaged = runner.invoke(main, ["average", "runs/long"])
    assert averaged.exit_code == 0, averaged.output
    assert metadata_of(run / "averaged.safetensors").step == int(said[1])
    predicted = runner.invoke(
        main, ["predict", "runs/long/averaged.safetensors", "data/validate", "-o", "p.csv"]
    )
    assert predicted.exit_code == 0, predicted.output


def test_an_interrupt_before_the_first_step_says_so(runner, own_workspace, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ensemble_kit.data.dataset.Records.training_batches", stop)

    result = runner.invoke(main, ["train", "recipes/mean.toml", *TRAINING, "--name", "new"])

    assert result.exit_code == 130
    assert result.stderr == "runs/new: stopped before its first step.\n"
