import json

from builders import rewrite_checkpoint
from workspace_fixture import MEMBERS

from ensemble_kit.cli import main


def test_runs_are_a_table(runner, own_workspace):
    rewrite_checkpoint(own_workspace.averaged("bag"), validation_gap=0.625)
    long = "a-name-that-is-cut-off-nowhere-" + "x" * 80
    for name in ("new", long):
        (own_workspace.path / "runs" / name).mkdir()
        (own_workspace.path / "runs" / name / "metrics.jsonl").write_text('{"step": 1250}\n')

    result = runner.invoke(main, ["runs"])

    lines = [line.split() for line in result.stdout.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert result.exit_code == 0, result.output
    assert rows["run"] == ["run", "recipe", "state", "steps", "best", "GAP", "averaged",
                           "parameters", "size"]  # fmt: skip
    assert rows["bag"][1:4] == ["bag", "finished", "24"]
    assert rows["bag"][5] == "0.6250"
    assert rows["new"] == ["new", "-", "stopped", "1,250", "-", "-", "-", "-"]
    assert rows[long][1:4] == ["-", "stopped", "1,250"]


def test_a_name_that_would_steer_the_terminal_is_shown_escaped(runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "evil\x1b[2J[red]x"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')

    result = runner.invoke(main, ["runs"])

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith(r"evil\x1b[2J[red]x ")


def test_runs_are_one_json_list(runner, workspace):
    result = runner.invoke(main, ["runs", str(workspace.path / "runs"), "--json"])

    found = json.loads(result.stdout)
    assert [run["name"] for run in found] == sorted(MEMBERS)
    assert found[0].keys() == {"name", "state", "recipe", "steps", "best_gap", "averaged_gap",
                               "parameters", "num_bytes"}  # fmt: skip
