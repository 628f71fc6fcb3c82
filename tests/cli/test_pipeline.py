"""The whole pipeline as a user types it, in a folder with records and recipes."""

import json
import shutil

import pytest
from workspace_fixture import MEMBERS, NUM_VIDEOS, TRAINING

from ensemble_kit.cli import main
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.store.selection_file import read_selection

TEST = "data/test/*.tfrecord"


@pytest.fixture
def type_in(runner, own_workspace):
    """Type a command in a workspace that has nothing but records and recipes."""
    shutil.rmtree("runs")
    shutil.rmtree("ensemble", ignore_errors=True)

    def run(*words):
        result = runner.invoke(main, words)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_the_pipeline_needs_no_further_argument(type_in, runner, own_workspace):
    ensemble = own_workspace.path / "ensemble"
    type_in("train", *(f"recipes/{name}.toml" for name in MEMBERS), *TRAINING)

    type_in("select")
    type_in("fuse", "--dtype", "bf16")
    type_in("export-onnx")

    assert sorted(path.name for path in ensemble.iterdir()) == [
        "README.md", "ensemble.onnx", "fused.safetensors", "selection.json"
    ]  # fmt: skip
    selection = read_selection(ensemble / "selection.json")
    members = json.loads(OnnxEnsemble(ensemble / "ensemble.onnx").metadata["members"])
    assert [m["name"] for m in members] == [m.name for m in selection.members]
    assert sum(m["coefficient"] for m in members) == pytest.approx(1)

    type_in("predict", "ensemble/ensemble.onnx", TEST, "-o", "submission.csv")
    lines = (own_workspace.path / "submission.csv").read_text().splitlines()
    assert lines[0] == "VideoId,LabelConfidencePairs"
    assert len(lines) == 1 + NUM_VIDEOS["test"]

    found = {
        model: json.loads(type_in("evaluate", model, TEST, "--json", *repeats))
        for model, *repeats in (
            ("ensemble/ensemble.onnx",),
            ("ensemble/fused.safetensors", "--repeats", "10"),
        )
    }
    onnx, fused = found.values()
    assert onnx["videos"] == NUM_VIDEOS["test"]
    assert onnx["gap"] == pytest.approx(fused["gap"], abs=5e-4)

    *table, page = type_in("report", TEST).splitlines()
    assert page == "ensemble/report.html: open it in a browser."
    assert len(table) == 1 + 2 * len(MEMBERS) + 3
    assert table[-1].split()[:3] == ["ensemble", "onnx", "10"]
    assert table[-1].split()[3] == f"{onnx['gap']:.4f}"

    before = {path: path.read_bytes() for path in ensemble.iterdir()}
    for command, path in (
        ("select", "ensemble/selection.json"),
        ("fuse", "ensemble/fused.safetensors"),
        ("export-onnx", "ensemble/ensemble.onnx"),
    ):
        again = runner.invoke(main, [command])
        assert (again.exit_code, again.stdout) == (1, "")
        assert again.stderr == (
            f"Error: {path} exists already.\nName another output, or replace it with --force.\n"
        )
    assert {path: path.read_bytes() for path in ensemble.iterdir()} == before


def test_the_validation_score_of_the_selection_is_the_ensembles(type_in, own_workspace):
    type_in("train", *(f"recipes/{name}.toml" for name in MEMBERS), *TRAINING)
    type_in("select")
    type_in("fuse", "--dtype", "fp32")

    found = json.loads(type_in("evaluate", "ensemble/fused.safetensors", "data/validate", "--json"))

    selection = read_selection(own_workspace.path / "ensemble" / "selection.json")
    assert len(selection.members) > 1
    assert found["gap"] == pytest.approx(selection.score, abs=1e-5)
