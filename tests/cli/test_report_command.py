import json
from dataclasses import asdict

import pytest

from ensemble_kit.cli import main
from ensemble_kit.report import Row

ROWS = [
    Row("willow-gru", "last checkpoint", 1, 0.8123456, 0.9, 12_345_678),
    Row("ensemble", "onnx", 10, 0.8765432, 0.95, 1_073_741_824),
]


@pytest.fixture
def scored(monkeypatch):
    """Report ``ROWS`` whatever there is; note what was asked."""
    asked = []
    monkeypatch.setattr(
        "ensemble_kit.report.report",
        lambda folder, records, *, k: asked.append((str(folder), records.patterns, k)) or ROWS,
    )
    return asked


def test_the_table_is_for_people(runner, scored, workspace):
    result = runner.invoke(main, ["report", str(workspace.path / "data" / "test"), "--top-k", "5"])

    assert result.exit_code == 0, result.output
    assert scored == [(".", (str(workspace.path / "data" / "test"),), 5)]
    assert result.stdout == (
        "model       form             repeats    GAP@5   Hit@1         bytes\n"
        "willow-gru  last checkpoint        1   0.8123  0.9000    12,345,678\n"
        "ensemble    onnx                  10   0.8765  0.9500  1,073,741,824\n"
    )


def test_the_json_is_the_rows(runner, scored, workspace):
    result = runner.invoke(main, ["report", str(workspace.path / "data" / "test"), "--json"])

    assert json.loads(result.stdout) == [asdict(row) for row in ROWS]
    assert scored[0][2] == 20


def test_progress_and_skipped_records_are_said_on_stderr(runner, own_workspace):
    shard = own_workspace.path / "data" / "test" / "test0001.tfrecord"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 0x40
    shard.write_bytes(content)

    result = runner.invoke(main, ["report", "data/test", "--skip-bad-records", "--json"])

    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) >= 8
    assert result.stderr.splitlines()[-1] == "1 bad records were skipped."


def test_a_folder_without_runs_is_an_error(runner, workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = runner.invoke(main, ["report", str(workspace.path / "data" / "test")])

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: runs holds no runs.\nTrain some with `ensemble-kit train` first.\n"
    )


def test_records_are_not_optional(runner):
    result = runner.invoke(main, ["report"])

    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Missing argument 'DATA...'.\n")
