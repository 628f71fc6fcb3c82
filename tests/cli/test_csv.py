"""``--csv`` of each command that prints a table: the values of its ``--json``, in full."""

import csv
import io
import json
from dataclasses import asdict

import pytest

from ensemble_kit.cli import main
from ensemble_kit.cli.options import echo_csv
from ensemble_kit.report.row import Row
from ensemble_kit.verification import Claim


@pytest.fixture
def both(runner):
    """Run a command twice, and return its rows as CSV has them and its result as JSON has it."""

    def run(*words):
        found = [runner.invoke(main, [*map(str, words), form]) for form in ("--csv", "--json")]
        assert [result.exit_code for result in found] == [0, 0], found[0].output
        return list(csv.DictReader(io.StringIO(found[0].stdout))), json.loads(found[1].stdout)

    return run


def as_text(row):
    return {key: "" if value is None else str(value) for key, value in row.items()}


def test_runs_have_every_column(both, workspace):
    rows, runs = both("runs", workspace.path)

    assert rows == [as_text(run) for run in runs]
    assert len(rows) > 1


def test_recipes_have_bytes_in_place_of_rounded_mebibytes(both):
    rows, entries = both("recipes", "list", "--paper", "willow")

    assert [row["name"] for row in rows] == [entry["name"] for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        assert int(row["bytes_in_bf16"]) == entry["bytes"]["bf16"]
        assert row["gap_at_20"] == str((entry["reported"] or {}).get("gap_at_20", ""))


def test_ensembles_have_a_row_for_each_gap_that_is_reported(both):
    rows, entries = both("recipes", "list", "--ensembles", "--paper", "nonlocal")

    reported = [(entry["name"], gap) for entry in entries for gap in entry["reported"]]
    assert [(row["name"], float(row["gap_at_20"])) for row in rows] == [
        (name, gap["gap_at_20"]) for name, gap in reported
    ]


def test_metrics_are_one_row(both, workspace):
    (row,), metrics = both(
        "evaluate", workspace.path / "runs" / "bag" / "validation.safetensors", "--rankings"
    )

    assert row == as_text(metrics)


def test_a_selection_has_a_row_for_each_step(both, chosen, tmp_path):
    rows, selection = both(
        "select", *chosen.files.values(), "--force", "-o", tmp_path / "selection.json"
    )

    for row, step in zip(rows, selection["path"], strict=True):
        low, high = step["gain_interval"] or (None, None)
        names = ("added", "dtype", "score", "gain", "confirmed_score", "confirmed_gain", "bytes")
        assert {key: row[key] for key in names} == as_text({key: step[key] for key in names})
        assert (row["gain_low"], row["gain_high"]) == (str(low), str(high))


def test_claims_have_a_row_each(both, monkeypatch, tmp_path):
    claims = [Claim("content", "holds", 'it, "is" whole'), Claim("gap", "not checked", "none")]
    monkeypatch.setattr("ensemble_kit.verification.verify", lambda *_, **__: claims)
    (tmp_path / "e.onnx").touch()

    rows, found = both("verify", tmp_path / "e.onnx")

    assert rows == found["claims"]


def test_scores_of_models_have_every_column(both, runner, workspace, monkeypatch, tmp_path):
    models = [Row("gru", "averaged", 1, 20, 0.8123456, 0.9, 12_345_678, 0.5)]
    monkeypatch.setattr("ensemble_kit.report.scores.score_models", lambda *_, **__: models)
    monkeypatch.chdir(tmp_path)

    rows, _ = both("report", workspace.path / "data" / "test")
    without_records = runner.invoke(main, ["report", "--csv"])

    assert rows == [as_text(asdict(model)) for model in models]
    assert without_records.exit_code == 2
    assert without_records.stderr.endswith(
        "Error: --csv prints the scores of models on records; name these as DATA.\n"
    )


@pytest.mark.parametrize("words", [["--csv", "--json"], ["--json", "--csv"]])
def test_both_forms_at_once_are_refused(runner, words):
    result = runner.invoke(main, ["recipes", "list", *words])

    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Output is JSON or CSV; give --json or --csv.\n")


def test_text_that_would_steer_a_terminal_is_escaped_and_a_row_is_one_line(capsys):
    echo_csv([{"name": "evil\x1b[2J,\nx", "gap": 0.1, "size": None}])

    assert capsys.readouterr().out == 'name,gap,size\n"evil\\x1b[2J,\\nx",0.1,\n'
