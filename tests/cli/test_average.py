import pytest

from ensemble_kit.checkpoints import open_tensors
from ensemble_kit.cli import main
from ensemble_kit.files import sha256_of
from ensemble_kit.provenance import CheckpointRecord


def average(runner, *words):
    result = runner.invoke(main, ["average", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def record_of(path):
    with open_tensors(path) as file:
        return file.record(CheckpointRecord)


def steps_of(path):
    return [int(file.path[-20:-12]) for file in record_of(path).averaged_from]


def test_a_run_is_averaged_as_training_did(runner, own_workspace):
    path = own_workspace.averaged("bag")
    before = sha256_of(path)
    path.unlink()

    printed = average(runner, "runs/bag")

    assert printed == (
        "runs/bag/averaged.safetensors: the mean of 3 checkpoints, batch norm recalibrate.\n"
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
    printed = average(runner, "runs/rnn", *options, "-o", "other.safetensors")

    assert printed.startswith(f"other.safetensors: the mean of {len(steps)} checkpoints, ")
    assert steps_of(own_workspace.path / "other.safetensors") == steps


def test_checkpoints_may_be_named(runner, own_workspace):
    folder = "runs/bag/checkpoints"
    named = [f"{folder}/step-00000024.safetensors", f"{folder}/step-00000006.safetensors"]

    printed = average(runner, *named, "-o", "other.safetensors", "--batch-norm", "last")

    assert printed == "other.safetensors: the mean of 2 checkpoints, batch norm last.\n"
    assert steps_of(own_workspace.path / "other.safetensors") == [6, 24]
    assert record_of(own_workspace.path / "other.safetensors").batch_norm == "last"


def test_other_records_may_be_used_and_their_bad_ones_counted(runner, own_workspace):
    shard = own_workspace.path / "data" / "validate" / "validate0002.tfrecord"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 0x40
    shard.write_bytes(content)
    options = ["--data", "data/validate", "--skip-bad-records", "-o", "other.safetensors"]

    result = runner.invoke(main, ["average", "runs/bag", *options])

    assert result.exit_code == 0, result.output
    assert result.stderr == "1 bad records were skipped.\n"
    with (
        open_tensors(own_workspace.path / "other.safetensors") as other,
        open_tensors(own_workspace.averaged("bag")) as trained,
    ):
        changed = {n for n, t in other.tensors() if not t.equal(trained.tensor(n))}
    assert changed
    assert all("running_" in name for name in changed)


def test_an_average_is_not_replaced_without_force(runner, own_workspace):
    refused = runner.invoke(main, ["average", "runs/bag"])
    forced = runner.invoke(main, ["average", "runs/bag", "--last", "2", "--force"])

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
        (["runs/bag", "runs/rnn"], "Name one RUN, or the CHECKPOINTS of one."),
        (["runs/bag/averaged.safetensors"], "Name the file to write with -o."),
    ],
)
def test_what_cannot_be_meant_is_a_fault_of_usage(words, message, runner, own_workspace):
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
