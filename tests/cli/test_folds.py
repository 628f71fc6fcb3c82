"""From folds to final members: train --fold, predictions merge, select, train, fuse --refit."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from builders import tiny_recipe_text
from click.testing import CliRunner
from workspace_fixture import NUM_VIDEOS

from ensemble_kit.cli import main
from ensemble_kit.data.folds import Fold
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.store.provenance import FusedMetadata
from ensemble_kit.store.selection_file import read_selection
from ensemble_kit.store.tensor_files import open_tensors

RECIPES = {"mean": "average", "bag": "soft_bof"}


def train(data, name, *words):
    return ["train", f"{name}.toml", "--train", f"{data}/train/*.tfrecord", *words]


@pytest.fixture(scope="session")
def folds(workspace, tmp_path_factory):
    """A folder with two recipes, two folds of each, what they predict, and one run of each on all.

    Nothing may write into it.
    """
    root = tmp_path_factory.mktemp("folds")
    runner = CliRunner()
    data = workspace.path / "data"
    for name, pooling in RECIPES.items():
        text = tiny_recipe_text(
            pooling=pooling, learning_rate=0.02, max_steps=4, checkpoint_every=4, average_last=1
        )
        (root / f"{name}.toml").write_text(text)
    with contextlib.chdir(root):
        for name in RECIPES:
            for fold in ("1/2", "2/2"):
                words = train(data, name, "--fold", fold, "-o", "folds")
                result = runner.invoke(main, words)
                assert result.exit_code == 0, result.output
            files = [f"folds/{name}-fold-{number}-of-2/validation.safetensors" for number in "21"]
            words = ["predictions", "merge", *files, "-o", f"folds/{name}.safetensors"]
            result = runner.invoke(main, words)
            assert (result.exit_code, result.stdout) == (0, f"folds/{name}.safetensors\n")
            result = runner.invoke(main, train(data, name))
            assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def own_folds(folds, tmp_path, monkeypatch):
    """A copy of the folder, in which the test is."""
    monkeypatch.chdir(shutil.copytree(folds, tmp_path / "folds"))
    return tmp_path / "folds"


def test_a_fold_predicts_its_own_videos_and_the_merged_file_has_them_all(folds, workspace):
    parts = [
        read_predictions(folds / f"folds/mean-fold-{number}-of-2/validation.safetensors")
        for number in (1, 2)
    ]
    merged = read_predictions(folds / "folds/mean.safetensors")

    for number, part in enumerate(parts, 1):
        assert all(Fold(number, 2).holds(video) for video in part.ids)
    assert merged.ids == (*parts[0].ids, *parts[1].ids)
    assert len(merged.ids) == NUM_VIDEOS["train"]
    assert merged.rows(0, len(merged.ids)).tolist() == [
        row for part in parts for row in part.rows(0, len(part.ids)).tolist()
    ]
    assert merged.name == "mean"
    model = merged.metadata.model
    assert model.kind == "folds"
    assert [file.path for file in model.folds.checkpoints] == [
        f"mean-fold-{number}-of-2/averaged.safetensors" for number in (1, 2)
    ]


def test_members_selected_by_folds_are_fused_from_their_final_runs(own_folds, runner, workspace):
    selected = runner.invoke(main, ["select", "folds/mean.safetensors", "folds/bag.safetensors"])
    assert selected.exit_code == 0, selected.output
    selection = read_selection(Path("ensemble/selection.json"))
    assert selection.videos == NUM_VIDEOS["train"]

    fused = runner.invoke(main, ["fuse", "--refit", "runs"])

    assert fused.exit_code == 0, fused.output
    with open_tensors(Path("ensemble/fused.safetensors")) as file:
        metadata = file.metadata_as(FusedMetadata)
    assert [member.checkpoint.path for member in metadata.members] == [
        f"../runs/{member.name}/averaged.safetensors" for member in selection.members
    ]
    assert metadata.validation.is_refit
    checked = runner.invoke(
        main, ["verify", "ensemble/fused.safetensors", f"{workspace.path}/data/train/*.tfrecord"]
    )
    assert checked.exit_code == 0, checked.output
    assert "is claimed, of models that had not seen them" in checked.stdout


def error_of(runner, *words):
    result = runner.invoke(main, words)
    assert result.exit_code == 1, result.output
    return result.stderr


def test_what_is_no_final_run_of_a_member_is_refused(own_folds, runner, workspace):
    runner.invoke(main, ["select", "folds/mean.safetensors"])

    assert error_of(runner, "fuse") == (
        "Error: ensemble/selection.json: member mean was selected by out-of-fold predictions, of 2 "
        "models that have not seen all records.\n"
        "Train mean again without --fold, and name the folder of its run with --refit.\n"
    )
    assert error_of(runner, "fuse", "--refit", "other") == (
        "Error: other/mean/averaged.safetensors, the final member mean, does not exist.\n"
        "Train mean again without --fold, as the run other/mean.\n"
    )
    again = "Train mean with the values of its folds, but without --fold.\n"
    shutil.copytree("folds/mean-fold-1-of-2", "fold/mean")
    assert error_of(runner, "fuse", "--refit", "fold") == (
        f"Error: fold/mean/averaged.safetensors holds out a fold of the records.\n{again}"
    )
    data = workspace.path / "data"
    words = train(data, "mean", "-o", "wide", "--set", "training.learning_rate=0.03")
    assert runner.invoke(main, words).exit_code == 0
    assert error_of(runner, "fuse", "--refit", "wide") == (
        f"Error: wide/mean/averaged.safetensors has another recipe than its folds.\n{again}"
    )
    assert not Path("ensemble/fused.safetensors").exists()


FIRST, SECOND = (f"folds/mean-fold-{number}-of-2/validation.safetensors" for number in "12")
RUNS = "Name the validation.safetensors of each run that `ensemble-kit train --fold` has trained."


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [FIRST, FIRST],
            f"{FIRST} and {FIRST} both hold predictions of fold 1/2.\nName one file of each fold.",
        ),
        (
            [FIRST, SECOND.replace("mean", "bag")],
            f"{SECOND.replace('mean', 'bag')} is of a run with another name than {FIRST}.\n"
            "Merge the folds of one recipe, trained with the same options.",
        ),
        (
            [FIRST, "folds/mean.safetensors"],
            f"folds/mean.safetensors was not predicted by a checkpoint.\n{RUNS}",
        ),
    ],
)
def test_files_that_are_not_the_folds_of_one_recipe_are_refused(files, message, own_folds, runner):
    found = error_of(runner, "predictions", "merge", *files, "-o", "merged.safetensors")

    assert found == f"Error: {message}\n"
    assert not Path("merged.safetensors").exists()


def test_a_model_of_a_fold_that_has_changed_is_refused(own_folds, runner):
    shutil.copy("runs/mean/averaged.safetensors", "folds/mean-fold-2-of-2/averaged.safetensors")

    assert error_of(runner, "select", "folds/mean.safetensors") == (
        "Error: folds/mean-fold-2-of-2/averaged.safetensors has changed since it predicted "
        "folds/mean.safetensors.\nMerge the predictions of its folds again.\n"
    )
    assert error_of(runner, "predictions", "merge", FIRST, SECOND, "-o", "m.safetensors") == (
        f"Error: folds/mean-fold-2-of-2/averaged.safetensors has changed since it predicted "
        f"{SECOND}.\nPredict the fold again.\n"
    )


def test_a_fold_that_was_trained_is_another_run_than_the_whole(own_folds, runner, workspace):
    data = workspace.path / "data"

    again = runner.invoke(main, train(data, "mean", "--fold", "1/2", "-o", "folds", "--json"))

    assert json.loads(again.stdout)["was_finished"] is True
    whole = runner.invoke(main, train(data, "mean", "--name", "mean-fold-1-of-2", "-o", "folds"))
    assert "holds a run with other values of: training records" in whole.stderr
    both = train(data, "mean", "--fold", "1/2", "--validation", "x")
    refused = runner.invoke(main, both)
    assert refused.exit_code == 2
    assert "--fold takes validation records from --train; leave one out." in refused.stderr
