import contextlib
import fcntl
import json

import pytest
from builders import rewrite_checkpoint, tiny_schema
from foreign_models import CLASSES, WIDTH, foreign_weights, write_foreign
from workspace_fixture import MEMBERS

from ensemble_kit import import_onnx
from ensemble_kit.errors import InputError
from ensemble_kit.inference import evaluate_predictions
from ensemble_kit.networks.loading import load_member
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.store.run_log import read_metrics
from ensemble_kit.store.runs import list_runs
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.workspace import RunFolder


def write_log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@contextlib.contextmanager
def locked(run):
    with run.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def state_of(folder):
    (run,) = list_runs(folder)
    return run.state


def test_a_finished_run_is_told_from_its_files(workspace):
    found = {run.name: run for run in list_runs(workspace.path)}

    assert list(found) == sorted(MEMBERS)
    for name, run in found.items():
        lines = read_metrics(workspace.path / "runs" / name / "metrics.jsonl")
        assert (run.state, run.recipe, run.steps) == ("finished", name, 24)
        assert run.best_gap == max(
            line["validation"]["gap"] for line in lines if "validation" in line
        )
        validation = read_predictions(workspace.path / "runs" / name / "validation.safetensors")
        assert run.averaged_gap == evaluate_predictions(validation, None, k=20).gap
        averaged = workspace.averaged(name)
        assert run.num_bytes == averaged.stat().st_size
        with open_tensors(averaged) as file:
            model = load_member(file)
        assert run.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_gap_of_an_average_is_the_one_it_was_compared_by(own_workspace):
    rewrite_checkpoint(own_workspace.averaged("bag"), validation_gap=0.625)

    found = {run.name: run.averaged_gap for run in list_runs(own_workspace.path)}

    assert found["bag"] == 0.625


def test_a_folder_of_runs_may_be_named_too(workspace):
    assert list_runs(workspace.path / "runs") == list_runs(workspace.path)


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        ([{"step": 50}], "stopped"),
        ([{"step": 50}, {"step": 60, "state": "stopped"}], "stopped"),
        ([{"step": 50, "state": "stopped"}, {"step": 60}], "stopped"),
        ([{"step": 50}, {"step": 60, "state": "failed"}], "failed"),
        ([{"step": 50}, {"step": 60, "state": "finished"}], "finished"),
        ([], "stopped"),
    ],
)
def test_the_last_line_of_the_log_tells_the_state_unless_a_process_trains(lines, state, tmp_path):
    run = RunFolder(tmp_path / "gru")
    write_log(run.path, *lines)

    assert state_of(tmp_path) == state
    with locked(run):
        assert state_of(tmp_path) == "running"
    assert state_of(tmp_path) == state  # the file is still there


def test_a_run_without_checkpoints_has_no_recipe_and_no_size(tmp_path):
    write_log(tmp_path / "runs" / "gru", {"step": 1, "loss": 2.5})
    (tmp_path / "runs" / "notes").mkdir()

    (run,) = list_runs(tmp_path)

    assert (run.name, run.steps, run.best_gap, run.averaged_gap) == ("gru", 1, None, None)
    assert (run.recipe, run.parameters, run.num_bytes) == (None, None, None)


@pytest.mark.usefixtures("import_in_this_process")
def test_a_foreign_model_is_listed_beside_the_runs(tmp_path):
    schema = tiny_schema(widths={"rgb": WIDTH, "audio": 3}, num_classes=CLASSES)
    output = tmp_path / "runs" / "tagger" / "foreign.safetensors"
    import_onnx(
        write_foreign(tmp_path / "m.onnx"),
        output,
        schema=schema,
        name="tagger",
        inputs={"rgb": "pixels"},
        num_frames="lengths",
        activation="sigmoid",
    )

    (run,) = list_runs(tmp_path)

    assert (run.name, run.state, run.recipe, run.steps) == ("tagger", "foreign", None, 0)
    assert (run.best_gap, run.averaged_gap) == (None, None)
    assert run.num_bytes == output.stat().st_size
    weights = foreign_weights().values()
    assert run.parameters == sum(weight.size for weight in weights if weight.dtype.kind == "f")

    output.write_bytes(b"damaged")
    (run,) = list_runs(tmp_path)
    assert (run.state, run.parameters, run.num_bytes) == ("foreign", None, 7)


def test_one_damaged_file_does_not_hide_the_runs(own_workspace):
    own_workspace.averaged("bag").write_bytes(b"damaged")

    found = {run.name: run for run in list_runs(own_workspace.path)}

    assert (found["bag"].recipe, found["bag"].parameters) == (None, None)
    assert found["bag"].best_gap is not None
    assert found["rnn"].recipe == "rnn"


def test_without_an_average_the_last_checkpoint_is_looked_at(own_workspace):
    own_workspace.averaged("bag").unlink()
    last = own_workspace.path / "runs/bag/checkpoints/step-00000024.safetensors"

    found = {run.name: run for run in list_runs(own_workspace.path)}

    assert (found["bag"].recipe, found["bag"].averaged_gap) == ("bag", None)
    assert found["bag"].num_bytes == last.stat().st_size


@pytest.mark.parametrize("name", ["", "no/such"])
def test_a_folder_without_runs_is_named(name, tmp_path):
    with pytest.raises(InputError) as caught:
        list_runs(tmp_path / name)

    assert str(caught.value) == (
        f"{tmp_path / name} holds no runs.\n"
        "Train some with `ensemble-kit train`, or name a folder of runs."
    )
