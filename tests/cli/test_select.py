"""ensemble-kit select: a workspace without arguments, and CSV files made by any tool."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from builders import bytes_by_dtype

from ensemble_kit.cli import main
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.store.provenance import FileMetadata, ModelMetadata
from ensemble_kit.store.selection_file import read_selection

LABELS = LabelLists.from_lists([[0], [1], [2]])
RIGHT = 0.5 * np.eye(3) + 0.125 * np.arange(9).reshape(3, 3) / 8  # the right class, no ties


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Two runs that are right for different videos, and one that is never right."""
    monkeypatch.chdir(tmp_path)
    for name, is_right in (("gru", (1, 1, 0)), ("vlad", (0, 0, 1)), ("poor", (0, 0, 0))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_predictions(
            tmp_path / "runs" / name / "validation.safetensors",
            ids=("a", "b", "c"),
            label_names=("x", "y", "z"),
            labels=LABELS,
            rows=np.where(np.array(is_right)[:, None], RIGHT, 1 / 8 - RIGHT[::-1] / 8),
            name=name,
            model=ModelMetadata(
                file=FileMetadata(path="averaged.safetensors", sha256="a" * 64),
                kind="checkpoint",
                num_values=2**19,
                bytes_by_dtype=bytes_by_dtype(2**20),
                repeats=1,
            ),
            force=False,
        )
    return tmp_path


@pytest.fixture
def csv_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "A.csv").write_text("VideoId,LabelConfidencePairs\na,0 0.9\nb,1 0.8\nc,0 0.3\n")
    (tmp_path / "B.csv").write_text("VideoId,LabelConfidencePairs\nc,2 0.7\nb,0 0.2\na,1 0.1\n")
    (tmp_path / "Y.csv").write_text("VideoId,Labels\na,0\nb,1\nc,2\n")
    return ["A.csv", "B.csv", "--labels", "Y.csv"]


def test_a_workspace_needs_no_argument(runner, workspace):
    result = runner.invoke(main, ["select"])

    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "step  added  GAP@20     gain     95 % of gain       bytes  limit\n"
        "   1  gru    0.9167  +0.9167  +0.5000 +1.0000   1,048,576   0.1%\n"  # (1 + 1 + 3/4) / 3
        "   2  vlad   1.0000  +0.0833  +0.0000 +0.5000~  2,097,152   0.2%\n"
        "ensemble/selection.json: 2 of 3 candidates, GAP@20 1.0000, 2.0 MiB of 1.0 GiB in bf16.\n"
        "No ensemble that fits is better (7 ensembles measured); greedy search would choose the "
        "same members.\n"
        "~ What vlad added cannot be told from noise.\n"
    )
    selection = read_selection(workspace / "ensemble" / "selection.json")
    assert [member.model.file.path for member in selection.members] == [
        "../runs/gru/averaged.safetensors",
        "../runs/vlad/averaged.safetensors",
    ]


def test_the_limit_and_the_type_are_options(runner, workspace):
    result = runner.invoke(
        main, ["select", "--max-size", "3MiB", "--dtype", "fp32", "-o", "s.json", "--json"]
    )

    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((workspace / "s.json").read_text())
    assert (printed["max_size"], printed["dtypes"], printed["bytes"]) == (
        3 * 2**20,
        ["fp32"],
        2**21,
    )
    assert [member["name"] for member in printed["members"]] == ["gru"]


def test_members_may_be_mixed_by_their_own_gaps(runner, workspace):
    result = runner.invoke(main, ["select", "--mixing", "gap", "--json"])

    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["mixing"] == "gap"
    gru, vlad = printed["members"]
    assert (gru["name"], vlad["name"]) == ("gru", "vlad")
    assert gru["coefficient"] == pytest.approx(gru["score"] / (gru["score"] + vlad["score"]))
    assert gru["score"] > vlad["score"]


def test_members_may_be_chosen_by_macro_map(runner, workspace):
    result = runner.invoke(main, ["select", "--metric", "macro-map", "--resamples", "0"])

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("step  added  macro mAP     gain")
    assert "candidates, macro mAP 1.0000, " in result.stdout
    selection = read_selection(workspace / "ensemble" / "selection.json")
    assert (selection.metric, selection.score) == ("macro-map", 1)


def test_what_is_held_out_is_shown_beside_what_is_chosen_by(runner, workspace):
    result = runner.invoke(main, ["select", "--confirm", "0.5", "--resamples", "0"])

    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "step  added  GAP@20     gain  held out      bytes  limit\n"
        "   1  gru    1.0000  +1.0000    0.8333  1,048,576   0.1%\n"
        "ensemble/selection.json: 1 of 3 candidates, GAP@20 0.9167, 1.0 MiB of 1.0 GiB in bf16.\n"
        "No ensemble that fits is better (7 ensembles measured); greedy search would choose the "
        "same members.\n"
        "Chosen on 1 video (GAP 1.0000), confirmed on 2 others (GAP 0.8333).\n"
    )


def test_what_optimised_coefficients_gained_is_said(runner, workspace):
    options = ["--mixing", "optimised", "--resamples", "0", "--confirm", "0.5"]

    result = runner.invoke(main, ["select", *options])

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == (
        "Optimised coefficients changed the GAP from 1.0000 to 1.0000, and on the held-out videos "
        "from 0.8333 to 0.8333."
    )
    without = runner.invoke(main, ["select", *options[:-2], "--force"])
    assert without.stdout.splitlines()[-1] == (
        "Optimised coefficients changed the GAP from 1.0000 to 1.0000."
    )


def test_given_coefficients_are_said_to_be_given(runner, workspace):
    result = runner.invoke(
        main, ["select", "--weight", "vlad=0.75", "--weight", "gru=0.25", "--resamples", "0"]
    )

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == (
        "Members and mixing coefficients were given; nothing was chosen by the GAP."
    )
    selection = read_selection(Path("ensemble/selection.json"))
    members = {member.name: member.coefficient for member in selection.members}
    assert members == {"vlad": 0.75, "gru": 0.25}
    assert (selection.mixing, selection.search.strategy) == ("given", "given")


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (["gru"], "'gru' is not a name and a coefficient."),
        (["gru=0.5", "gru=0.5"], "'gru=0.5' is a second coefficient of gru."),
        (["gru=half"], "The coefficient of gru is 'half', not a number."),
    ],
)
def test_coefficients_that_cannot_be_read_are_refused(runner, workspace, weights, problem):
    result = runner.invoke(main, ["select", *(f"--weight={weight}" for weight in weights)])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {problem}\n"
        "Write NAME=X once for each member: --weight gru=0.4 --weight vlad=0.6.\n"
    )


def test_the_search_is_an_option(runner, workspace):
    options = ["--strategy", "replacement", "--max-members", "4", "--start", "vlad"]
    options += ["--exclude", "poor", "--seed", "3", "--resamples", "5", "--mixing", "optimised"]

    result = runner.invoke(main, ["select", *options, "--json"])

    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["search"] == {
        "strategy": "replacement",
        "criterion": "gain",
        "max_members": 4,
        "beam_width": None,
        "start": ["vlad"],
        "excluded": ["poor"],
        "evaluations": 8,  # of each number up to 4
        "greedy_score": 1.0,
        "greedy_path": ["vlad", "gru"],
    }
    assert printed["bootstrap"] == {"resamples": 5, "level": 0.95, "seed": 3}
    assert printed["mixing"] == "optimised"
    assert [step["added"] for step in printed["path"]] == ["vlad", "gru"]
    assert sorted(one["name"] for one in printed["candidates"]) == ["gru", "vlad"]


def test_csv_files_made_by_any_tool_are_selected_from(runner, csv_files):
    options = ["--top-k", "2", "--size", "A=4MB", "--size", "B=7MB", "--max-size", "11MB"]

    result = runner.invoke(main, ["select", *csv_files, *options, "--json"])

    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["k"] == 2
    assert [(step["added"], step["bytes"]) for step in printed["path"]] == [
        ("A", 4_000_000),
        ("B", 11_000_000),
    ]


def test_greedys_distance_from_the_best_is_said(runner, workspace):
    options = ["--resamples", "0", "--size", "gru=150", "--size", "poor=100", "--size", "vlad=100"]
    rows = read_predictions(workspace / "runs" / "poor" / "validation.safetensors")
    write_predictions(
        rows.path,
        ids=rows.ids,
        label_names=rows.label_names,
        labels=rows.labels,
        rows=np.where(np.array([1, 1, 0])[:, None], RIGHT, [0.4, 0.38, 0.35]),
        name="poor",
        model=rows.metadata.model,
        force=True,
    )

    exact = runner.invoke(main, ["select", *options, "--max-size", "200"])
    beam = runner.invoke(
        main, ["select", *options, "--max-size", "200", "--strategy", "beam", "--force"]
    )

    assert exact.exit_code == 0, exact.output
    gap = read_selection(workspace / "ensemble" / "selection.json").path[-1].score
    assert exact.stdout.splitlines()[-1] == (
        "No ensemble that fits is better (4 ensembles measured); greedy search would choose gru, "
        f"with GAP@20 0.9167, {gap - 0.9166666:.4f} less."
    )
    assert beam.stdout.splitlines()[-1] == (
        f"Greedy search would choose gru, with GAP@20 0.9167, {gap - 0.9166666:.4f} less."
    )


def test_what_has_no_known_size_is_not_said_to_take_0_bytes(runner, csv_files):
    result = runner.invoke(main, ["select", *csv_files, "--resamples", "0"])

    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "step  added  GAP@20     gain\n"
        "   1  A      0.6667  +0.6667\n"
        "   2  B      1.0000  +0.3333\n"
        "ensemble/selection.json: 2 of 2 candidates, GAP@20 1.0000, of unknown size.\n"
        "No ensemble that fits is better (3 ensembles measured); greedy search would choose the "
        "same members.\n"
        "A, B left out classes. Whatever their probabilities are, the GAP of the members is from "
        "0.2421 to 1.0000, and other members might be chosen.\n"
    )


def test_a_member_of_unknown_size_beside_one_of_the_kit_is_named(runner, workspace):
    Path("D.csv").write_text("VideoId,LabelConfidencePairs\na,0 0.9\nb,1 0.9\nc,2 0.9\n")
    paths = ["D.csv", *map(str, sorted(Path("runs").glob("*/validation.safetensors")))]

    result = runner.invoke(main, ["select", *paths, "--start", "gru", "--start", "D"])

    assert result.stdout.splitlines()[3] == (
        "ensemble/selection.json: 2 of 4 candidates, GAP@20 1.0000, 1.0 MiB of 1.0 GiB in bf16 "
        "without D, of unknown size."
    )


def test_videos_that_were_left_out_are_counted(runner, csv_files):
    Path("A.csv").write_text("VideoId,LabelConfidencePairs\na,0 0.9\nb,1 0.8\n")

    result = runner.invoke(main, ["select", *csv_files, "--intersect", "--resamples", "0"])

    assert result.exit_code == 0, result.output
    assert "\n1 video that some file lacks was left out.\n" in result.stdout


def test_what_top_classes_leave_open_is_said(runner, workspace):
    path = workspace / "runs" / "gru" / "validation.safetensors"
    predictions = read_predictions(path)
    write_predictions(
        path,
        ids=predictions.ids,
        label_names=predictions.label_names,
        labels=predictions.labels,
        rows=predictions.rows(0, 3),
        name="gru",
        model=predictions.metadata.model,
        top_k=2,
        force=True,
    )

    result = runner.invoke(main, ["select", "--strategy", "beam"])

    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith(
        "gru left out classes. Whatever their probabilities are, the GAP of the members is from "
    )
    assert last.endswith(", and these bounds do not say whether other members would be chosen.")
    given = runner.invoke(main, ["select", "--weight", "gru=1", "--force"])
    assert re.search(r"the GAP of the members is from \S+ to \d\.\d{4}\.$", given.stdout)


def test_a_name_that_would_steer_the_terminal_is_shown_escaped(runner, csv_files):
    name = "\x1b[31mA\u202e"
    Path("A.csv").rename(f"{name}.csv")

    result = runner.invoke(main, ["select", f"{name}.csv", *csv_files[1:]])

    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout
    assert "   1  \\x1b[31mA\\u202e  0.6667" in result.stdout


def test_a_limit_without_sizes_is_refused(runner, csv_files):
    for options in (["--max-size", "1GiB"], ["--size", "B=1MB"]):
        result = runner.invoke(main, ["select", *csv_files, *options])

        assert result.exit_code == 1
        assert result.stderr == (
            "Error: The size of A is not known: A.csv does not name a model of the kit.\n"
            "Give the size of every such candidate: --size A=4MB.\n"
        )


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        (["4MB"], "'4MB' is not a name and a size."),
        (["A=4MB", "A=5MB"], "'A=5MB' is a second size of A."),
    ],
)
def test_a_size_without_a_name_and_a_second_size_are_refused(runner, csv_files, sizes, problem):
    options = [word for size in sizes for word in ("--size", size)]

    result = runner.invoke(main, ["select", *csv_files, *options])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {problem}\nWrite NAME=SIZE once for each candidate: --size gru=4MB.\n"
    )


def test_a_selection_is_kept_unless_forced(runner, workspace):
    runner.invoke(main, ["select"])

    again = runner.invoke(main, ["select"])
    forced = runner.invoke(main, ["select", "--force"])

    assert again.exit_code == 1
    assert again.stderr == (
        "Error: ensemble/selection.json exists already.\n"
        "Name another output, or replace it with --force.\n"
    )
    assert forced.exit_code == 0


def test_a_folder_without_runs_is_refused(runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = runner.invoke(main, ["select"])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: There are no predictions: runs/*/validation.safetensors matches nothing in "
        f"{tmp_path}.\n"
        "Name predictions files, or change to a folder where `ensemble-kit train` ran.\n"
    )


def test_a_command_that_was_stopped_before_its_page_goes_on(runner, workspace, monkeypatch):
    monkeypatch.setattr("ensemble_kit.report.page.bokeh_script", str)
    page = Path("ensemble/report.html")
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patch.setattr("ensemble_kit.report.page.write_report", stop)
        assert runner.invoke(main, ["select", "--report"]).exit_code == 130
    written = Path("ensemble/selection.json").stat().st_mtime_ns

    other = runner.invoke(main, ["select", "--report", "--seed", "1"])
    again = runner.invoke(main, ["select", "--report"])

    assert other.exit_code == 1
    assert other.stderr.endswith(
        "Error: ensemble/selection.json exists already.\n"
        "Name another output, or replace it with --force.\n"
    )
    assert again.exit_code == 0, again.output
    assert page.is_file()
    assert Path("ensemble/selection.json").stat().st_mtime_ns == written


def test_a_report_is_written_beside_the_selection(runner, workspace, monkeypatch):
    monkeypatch.setattr("ensemble_kit.report.page.bokeh_script", str)
    page = Path("ensemble/report.html")

    result = runner.invoke(main, ["select", "--report"])

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "ensemble/report.html: open it in a browser."
    assert read_selection(Path("ensemble/selection.json")).dataset_sha256 in page.read_text("utf-8")

    page.write_text("mine", encoding="utf-8")
    Path("ensemble/selection.json").unlink()
    again = runner.invoke(main, ["select", "--report"])
    assert (again.exit_code, Path("ensemble/selection.json").exists()) == (1, False)
    assert again.stderr == (
        "Error: ensemble/report.html exists already.\n"
        "Name another output, or replace it with --force.\n"
    )
    assert json.loads(runner.invoke(main, ["select", "--report", "--force", "--json"]).stdout)
    assert page.read_text("utf-8") != "mine"
