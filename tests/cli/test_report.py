import json
from dataclasses import asdict
from pathlib import Path

import pytest

from ensemble_kit.cli import main
from ensemble_kit.report import page
from ensemble_kit.report.row import Row

ROWS = [
    Row("willow-gru", "last checkpoint", 1, 5, 0.8123456, 0.9, 12_345_678, 0.5),
    Row("ensemble", "onnx", 10, 5, 0.8765432, 0.95, 1_073_741_824, 0.25),
]


@pytest.fixture
def scored(monkeypatch):
    """Report ``ROWS`` whatever there is; note what was asked."""
    asked = []
    monkeypatch.setattr(
        "ensemble_kit.report.scores.score_models",
        lambda folder, records, *, k: asked.append((str(folder), records.patterns, k)) or ROWS,
    )
    return asked


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder without a selection, which is the current one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_chosen(own_chosen, monkeypatch):
    """A folder with a selection, which is the current one; its pages lack the JavaScript."""
    monkeypatch.chdir(own_chosen.path.parents[1])
    monkeypatch.setattr(page, "bokeh_script", str)
    return own_chosen


def test_the_table_is_for_people(runner, scored, workspace, in_folder):
    result = runner.invoke(main, ["report", str(workspace.path / "data" / "test"), "--top-k", "5"])

    assert result.exit_code == 0, result.output
    assert scored == [(".", (str(workspace.path / "data" / "test"),), 5)]
    assert result.stdout == (
        "model       form             repeats    GAP@5   Hit@1         bytes\n"
        "willow-gru  last checkpoint        1   0.8123  0.9000    12,345,678\n"
        "ensemble    onnx                  10   0.8765  0.9500  1,073,741,824\n"
        "No page was written, for ensemble/selection.json does not exist.\n"
    )


def test_the_json_is_the_rows_and_the_page(runner, scored, workspace, in_chosen):
    result = runner.invoke(main, ["report", str(workspace.path / "data" / "test"), "--json"])

    assert json.loads(result.stdout) == {
        "page": "ensemble/report.html", "models": [asdict(row) for row in ROWS]
    }  # fmt: skip
    assert scored[0][2] == 20
    assert "willow-gru" in Path("ensemble/report.html").read_text(encoding="utf-8")


def test_without_records_the_page_of_the_selection_is_written(runner, in_chosen):
    result = runner.invoke(main, ["report"])

    assert result.exit_code == 0, result.output
    assert result.stdout == "ensemble/report.html: open it in a browser.\n"
    assert in_chosen.selection.dataset_sha256 in Path("ensemble/report.html").read_text("utf-8")


def test_another_selection_and_another_page_may_be_named(runner, in_chosen, in_folder):
    result = runner.invoke(
        main, ["report", "--selection", str(in_chosen.path), "-o", "mine.html", "--json"]
    )

    assert json.loads(result.stdout) == {"page": "mine.html", "models": []}
    assert Path("mine.html").is_file()


def test_a_page_is_refused_before_the_models_are_scored(runner, scored, in_chosen):
    Path("ensemble/report.html").write_text("mine", encoding="utf-8")

    result = runner.invoke(main, ["report", "data/test"])

    assert (result.exit_code, result.stdout, scored) == (1, "", [])
    assert result.stderr == (
        "Error: ensemble/report.html exists already.\n"
        "Name another output, or replace it with --force.\n"
    )
    assert runner.invoke(main, ["report", "--force"]).exit_code == 0


def test_progress_and_skipped_records_are_said_on_stderr(runner, own_workspace):
    shard = own_workspace.path / "data" / "test" / "test0001.tfrecord"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 0x40
    shard.write_bytes(content)

    result = runner.invoke(main, ["report", "data/test", "--skip-bad-records", "--json"])

    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["models"]) >= 8
    assert result.stderr.splitlines()[-1] == "1 bad record was skipped."


def test_a_folder_without_runs_is_an_error(runner, workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = runner.invoke(main, ["report", str(workspace.path / "data" / "test")])

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == ("Error: runs holds no runs.\nRun `ensemble-kit train` first.\n")


def test_without_records_there_must_be_a_selection(runner, in_folder):
    result = runner.invoke(main, ["report"])

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: ensemble/selection.json cannot be read: No such file or directory.\n"
        "Run `ensemble-kit select` first, or name a selection that exists.\n"
    )
