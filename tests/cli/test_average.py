import json
import re
import shutil

import pytest
from builders import metadata_of, rewrite_checkpoint
from workspace_fixture import TRAINING

from ensemble_kit.cli import main
from ensemble_kit.files import sha256_of
from ensemble_kit.store.tensor_files import open_tensors


def average(runner, *words):
    result = runner.invoke(main, ["average", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def steps_of(path):
    return [int(file.path[-20:-12]) for file in metadata_of(path).averaged_from]


def test_a_run_is_averaged_as_training_did(runner, own_workspace):
    alone = [*TRAINING[:2], "--name", "alone"]  # without validation records, hence the mean
    assert runner.invoke(main, ["train", "recipes/bag.toml", *alone]).exit_code == 0
    path = own_workspace.averaged("alone")
    before = sha256_of(path)
    path.unlink()

    printed = average(runner, "runs/alone")

    assert printed.startswith(
        "runs/alone/averaged.safetensors: the mean of 3 checkpoints, batch norm recalibrate.\n"
    )
    assert sha256_of(path) == before
    assert steps_of(path) == [12, 18, 24]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--last", "2"], [18, 24]),
        (["--last", "99"], [6, 12, 18, 24]),
        (["--from-step", "18"], [18, 24]),
        (["--from-step", "7", "--last", "4"], [12, 18, 24]),
    ],
)
def test_which_checkpoints_are_averaged_is_an_option(options, steps, runner, own_workspace):
    options = [*options, "--even-if-worse", "-o", "other.safetensors"]

    printed = average(runner, "runs/rnn", *options)

    assert printed.startswith(f"other.safetensors: the mean of {len(steps)} checkpoints, ")
    assert steps_of(own_workspace.path / "other.safetensors") == steps


def test_checkpoints_may_be_named(runner, own_workspace):
    folder = "runs/bag/checkpoints"
    named = [f"{folder}/step-00000024.safetensors", f"{folder}/step-00000006.safetensors"]

    options = ["-o", "other.safetensors", "--batch-norm", "last", "--even-if-worse"]

    printed = average(runner, *named, *options)

    assert printed.startswith("other.safetensors: the mean of 2 checkpoints, batch norm last.\n")
    assert steps_of(own_workspace.path / "other.safetensors") == [6, 24]
    assert metadata_of(own_workspace.path / "other.safetensors").batch_norm == "last"


def test_other_records_may_be_used_and_their_bad_ones_counted(runner, own_workspace):
    average(runner, "runs/bag", "--even-if-worse", "--force")
    shutil.copytree("data/validate", "data/damaged")
    shard = own_workspace.path / "data" / "damaged" / "validate0002.tfrecord"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 0x40
    shard.write_bytes(content)
    options = ["--data", "data/damaged", "--skip-bad-records", "--even-if-worse"]

    result = runner.invoke(main, ["average", "runs/bag", *options, "-o", "other.safetensors"])

    assert result.exit_code == 0, result.output
    assert result.stderr.endswith("1 bad record was skipped.\n")
    with (
        open_tensors(own_workspace.path / "other.safetensors") as other,
        open_tensors(own_workspace.averaged("bag")) as trained,
    ):
        changed = {n for n, t in other.tensors() if not t.equal(trained.tensor(n))}
    assert changed
    assert all("running_" in name for name in changed)


def alone(runner, member, step):
    path = f"runs/{member}/checkpoints/step-{step:08d}.safetensors"
    result = runner.invoke(main, ["evaluate", path, "data/validate", "--json"])
    return json.loads(result.stdout)["gap"]


def test_an_average_is_compared_and_one_that_loses_is_kept_only_if_asked(runner, own_workspace):
    gaps = {step: alone(runner, "bag", step) for step in (6, 12, 18, 24)}
    best = max(gaps, key=gaps.get)
    named = f"runs/bag/checkpoints/step-{best:08d}.safetensors"
    # copies of the worst, and the best, of which the mean is much like the worst
    worst = own_workspace.path / "runs/bag/checkpoints" / f"step-{min(gaps, key=gaps.get):08d}"
    for number in range(9):
        shutil.copy(worst.with_suffix(".safetensors"), f"{number}.safetensors")
    words = ["average", named, *(f"{n}.safetensors" for n in range(9)), "-o", "other.safetensors",
             "--batch-norm", "average", "--validation", "data/validate"]  # fmt: skip

    lost = runner.invoke(main, words)

    assert lost.exit_code == 1
    assert not (own_workspace.path / "other.safetensors").exists()
    assert lost.stdout == ""

    kept = runner.invoke(main, [*words, "--even-if-worse"])

    assert kept.exit_code == 0, kept.output
    found = runner.invoke(main, ["evaluate", "other.safetensors", "data/validate", "--json"])
    gap = json.loads(found.stdout)["gap"]
    assert kept.stdout == (
        "other.safetensors: the mean of 10 checkpoints, batch norm average.\n"
        f"Its validation GAP@20 is {gap:.5f}; the best single checkpoint, {named}, has "
        f"{gaps[best]:.5f}.\n"
    )
    assert lost.stderr.endswith(
        f"Error: The mean of 10 checkpoints has a validation GAP@20 of {gap:.5f}, but {named} "
        f"alone has {gaps[best]:.5f}; nothing was written.\n"
        "Use that checkpoint, or write the average anyway with --even-if-worse.\n"
    )


def test_without_validation_records_it_says_that_nothing_was_compared(runner, own_workspace):
    for path in own_workspace.path.glob("runs/vlad/checkpoints/*"):
        rewrite_checkpoint(path, validation_files=())

    printed = average(runner, "runs/vlad", "--force")

    assert printed == (
        "runs/vlad/averaged.safetensors: the mean of 3 checkpoints, batch norm recalibrate.\n"
        "There are no validation records, so it was not compared with anything.\n"
    )


def test_greedy_tells_what_it_tried(runner, own_workspace):
    options = ["--method", "greedy", "--validation", "data/validate", "-o", "other.safetensors"]

    lines = average(runner, "runs/vlad", *options).splitlines()

    gaps = {f"step-{step:08d}.safetensors": alone(runner, "vlad", step) for step in (6, 12, 18, 24)}
    order = sorted(gaps, key=gaps.get, reverse=True)
    assert lines[0] == f"{order[0]}: GAP@20 {gaps[order[0]]:.5f} alone, the best"
    for name, line in zip(order[1:], lines[1:4], strict=True):
        assert re.fullmatch(rf"{name}: GAP@20 0\.\d{{5}} with it, (added|left out)", line)
    added = 1 + sum(line.endswith(" added") for line in lines)
    assert lines[4].startswith(f"other.safetensors: the mean of {added} checkpoint")
    assert len(lines) == 6


def test_the_moving_average_of_a_run_is_finished(runner, own_workspace):
    last = own_workspace.path / "runs/rnn/checkpoints/step-00000024.safetensors"
    shutil.copy(last, "runs/rnn/ema.safetensors")
    rewrite_checkpoint(own_workspace.path / "runs/rnn/ema.safetensors", ema_decay=0.99)
    options = ["--method", "ema", "--batch-norm", "average", "--validation", "data/validate"]

    printed = average(runner, "runs/rnn", *options, "--force")

    gap = alone(runner, "rnn", 24)
    assert printed.splitlines()[0] == (
        "runs/rnn/averaged.safetensors: the exponential moving average, batch norm average."
    )
    assert printed.splitlines()[1].startswith(f"Its validation GAP@20 is {gap:.5f}; the best ")
    assert metadata_of(own_workspace.averaged("rnn")).ema_decay == 0.99


def test_an_average_is_not_replaced_without_force(runner, own_workspace):
    refused = runner.invoke(main, ["average", "runs/bag"])
    options = ["--last", "2", "--force", "--even-if-worse"]
    forced = runner.invoke(main, ["average", "runs/bag", *options])

    assert (refused.exit_code, forced.exit_code) == (1, 0)
    assert refused.stderr == (
        "Error: runs/bag/averaged.safetensors exists already.\n"
        "Name another output, or replace it with --force.\n"
    )
    assert steps_of(own_workspace.averaged("bag")) == [18, 24]


def test_checkpoints_of_different_runs_are_refused(runner, own_workspace):
    named = [f"runs/{name}/checkpoints/step-00000024.safetensors" for name in ("bag", "rnn")]

    result = runner.invoke(main, ["average", *named, "-o", "other.safetensors"])

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {named[1]} and {named[0]} hold different tensors (")
    assert result.stderr.endswith(
        "Average checkpoints of one run only: same recipe, same architecture.\n"
    )
    assert not (own_workspace.path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/bag", "runs/rnn"], "Name one RUN, or the CHECKPOINTS of one run."),
        (["runs/bag/averaged.safetensors"], "Name the file to write with -o."),
        (
            ["runs/bag/averaged.safetensors", "-o", "other.safetensors", "--last", "2"],
            "--last and --from-step choose among the checkpoints of a RUN.",
        ),
        (
            ["runs/bag", "--method", "ema", "--from-step", "6"],
            "--last and --from-step choose among the checkpoints of a RUN.",
        ),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(words, message, runner, own_workspace):
    result = runner.invoke(main, ["average", *words])

    assert result.exit_code == 2
    assert result.stderr.endswith(f"Error: {message}\n")


def test_a_folder_without_checkpoints_is_named(runner, own_workspace):
    result = runner.invoke(main, ["average", "data"])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: data holds no checkpoints (checkpoints/step-*.safetensors).\n"
        "Name the folder of a run that `ensemble-kit train` has made.\n"
    )
