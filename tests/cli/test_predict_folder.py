"""`predict -o FOLDER/`, with shares and jobs, and what other commands make of the folder."""

import json
import sys

import pytest
from builders import tiny_recipe, tiny_recipe_text, write_checkpoint
from safetensors.numpy import load_file

from ensemble_kit.cli import main
from ensemble_kit.data.synthetic import synthesize


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    schema = synthesize(
        folder, num_videos={"test": 30}, modalities={"rgb": 8}, num_classes=5, frames=(2, 7),
        num_shards=3,
    )  # fmt: skip
    write_checkpoint(folder / "model.safetensors", tiny_recipe(), schema, name="mine")
    return folder


def predict(runner, data, output, *words):
    model, records = str(data / "model.safetensors"), str(data / "test")
    return runner.invoke(main, ["predict", model, records, "-o", output, *words])


def test_a_folder_is_resumed_evaluated_and_merged(runner, data, tmp_path):
    output = f"{tmp_path}/out/"

    first, again = (predict(runner, data, output) for _ in range(2))

    assert (first.exit_code, first.stdout) == (
        0, f"{tmp_path}/out: 3 files predicted, 0 already there\n"
    )  # fmt: skip
    assert again.stdout == f"{tmp_path}/out: 0 files predicted, 3 already there\n"
    merged = str(tmp_path / "merged.safetensors")
    result = runner.invoke(main, ["predictions", "merge", output, "-o", merged])
    assert (result.exit_code, result.stdout) == (0, f"{merged}\n")
    metrics = [
        json.loads(runner.invoke(main, ["evaluate", each, "--json"]).stdout)
        for each in (output, merged)
    ]
    assert metrics[0] == metrics[1]
    assert metrics[0]["videos"] == 30


def test_a_folder_is_a_candidate_whose_model_may_not_have_changed(runner, data, tmp_path):
    predict(runner, data, f"{tmp_path}/out/")
    single = str(tmp_path / "other.csv")
    predict(runner, data, single, "--top-k", "5")
    selection = tmp_path / "selection.json"

    result = runner.invoke(
        main, ["select", f"{tmp_path}/out", single, "--size", "other=1MB", "-o", str(selection)]
    )

    assert result.exit_code == 0, result.stderr
    candidates = json.loads(selection.read_text())["candidates"]
    assert [each["name"] for each in candidates] == ["mine", "other"]


def test_a_report_reads_a_folder_until_a_file_of_it_has_changed(
    runner, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("ensemble_kit.report.page.bokeh_script", str)
    predict(runner, data, f"{tmp_path}/out/")
    selection, page = str(tmp_path / "selection.json"), tmp_path / "report.html"
    runner.invoke(main, ["select", f"{tmp_path}/out", "-o", selection])
    words = ["report", "--selection", selection, "-o", str(page), "--force"]

    whole = runner.invoke(main, words)

    assert whole.exit_code == 0, whole.stderr
    assert "is not there" not in page.read_text()
    shard = tmp_path / "out" / "test0001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + bytes(4))
    changed = runner.invoke(main, words)
    assert changed.exit_code == 0, changed.stderr
    assert "out has changed since the selection was made." in page.read_text()


def test_a_folder_teaches_what_the_merged_file_teaches(runner, data, tmp_path):
    predict(runner, data, f"{tmp_path}/out/", "--top-k", "3")
    merged = tmp_path / "merged.safetensors"
    runner.invoke(main, ["predictions", "merge", f"{tmp_path}/out", "-o", str(merged)])
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_recipe_text())

    for name, teacher in (("folder", tmp_path / "out"), ("file", merged)):
        result = runner.invoke(
            main,
            ["train", str(recipe), "--train", str(data / "test"), "--teacher", str(teacher),
             "--teacher-share", "0.5", "--name", name, "-o", str(tmp_path / "runs"), "--quiet"],
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr

    weights = [
        load_file(max((tmp_path / "runs" / name / "checkpoints").glob("*")))
        for name in ("folder", "file")
    ]
    assert all((weights[0][name] == tensor).all() for name, tensor in weights[1].items())


def test_jobs_predict_their_parts_and_print_one_object(runner, data, tmp_path):
    result = predict(runner, data, f"{tmp_path}/out/", "--jobs", "2", "--json", "--quiet")

    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "path": f"{tmp_path}/out", "skipped": 0, "predicted": 3, "already_there": 0
    }  # fmt: skip


def test_all_files_are_listed_before_the_jobs_start(runner, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules["ensemble_kit.cli.predict"], "run_side_by_side", lambda *_, **__: 0
    )

    result = predict(runner, data, f"{tmp_path}/out/", "--jobs", "2", "--shard", "1/2")

    assert result.exit_code == 0, result.stderr
    listed = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert listed == {"files": [f"test000{number}.safetensors" for number in range(3)]}


@pytest.mark.parametrize("words", [["--shard", "1/2"], ["--jobs", "2"], ["--on", "auto"]])
def test_parts_are_written_to_a_folder(runner, data, tmp_path, words):
    result = predict(runner, data, str(tmp_path / "p.csv"), *words)

    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: --shard, --jobs and --on write a file for each file of records; name a folder, "
        "such as -o predictions/.\n"
    )


def test_a_full_standard_output_is_one_error(data, monkeypatch, capsys):
    model, records = str(data / "model.safetensors"), str(data / "test")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as caught:
            main(["predict", model, records, "-o", "-", "--quiet"])

    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "Error: Standard output cannot be written: No space left on device.\n"
        "Free some space, or send it elsewhere.\n"
    )
