"""ensemble-kit predict, and evaluate on models: one score whatever the file, batch and shard."""

import json
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from workspace_fixture import MEMBERS, NUM_VIDEOS, TRAINING, write_selection_of

from ensemble_kit.cli import main
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.tfrecord import read_records, write_records
from ensemble_kit.export.stage import export_onnx
from ensemble_kit.fusion.stage import fuse
from ensemble_kit.networks.loading import load_fused_member
from ensemble_kit.networks.running import runner as runner_of
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.store.provenance import FusedMetadata
from ensemble_kit.store.tensor_files import open_tensors

TEST = "data/test/*.tfrecord"
ORDER = 1e-6  # float32 sums in another order: some eps of a probability


@pytest.fixture(scope="module")
def forms(workspace, tmp_path_factory):
    """One sampling member as a checkpoint, as a fused file and as an ONNX file, in fp32."""
    folder = tmp_path_factory.mktemp("forms")
    checkpoint = workspace.averaged("bag")
    selection = write_selection_of(folder / "selection.json", {"bag": checkpoint}, {"bag": 1.0})
    fused = fuse(selection, folder / "fused.safetensors", dtype="fp32").path
    onnx = export_onnx(fused, folder / "ensemble.onnx", repeats=2).path
    return {"checkpoint": checkpoint, "fused": fused, "onnx": onnx}


@pytest.fixture
def predict(runner, workspace, tmp_path, monkeypatch):
    """Run the command; return probabilities by video."""
    monkeypatch.chdir(workspace.path)

    def run(model, *words):
        output = tmp_path / "p.safetensors"
        result = runner.invoke(main, ["predict", str(model), *words, "-o", str(output), "--force"])
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{output}\n"
        predictions = read_predictions(output)
        return dict(zip(predictions.ids, predictions.rows(0, len(predictions.ids)), strict=True))

    return run


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for video, row in expected.items():
        np.testing.assert_allclose(found[video], row, rtol=0, atol=ORDER, err_msg=video)


def models(forms, workspace, exported):
    return [*(workspace.averaged(name) for name in MEMBERS), forms["fused"], exported.path]


def test_the_batch_size_changes_no_score(predict, forms, workspace, exported):
    for model in models(forms, workspace, exported):
        together = predict(model, TEST)

        assert len(together) == NUM_VIDEOS["test"]
        for size in ("1", "5"):
            assert_alike(predict(model, TEST, "--batch-size", size), together)


def test_the_shard_a_video_came_from_changes_no_score(
    predict, forms, workspace, exported, tmp_path
):
    shards = sorted((workspace.path / "data" / "test").glob("*.tfrecord"))
    records = [bytes(record) for path in shards for record in read_records(path)]
    mixed = [records[index] for index in np.random.default_rng(0).permutation(len(records))]
    for name in ("schema.toml", "label_names.csv"):
        (tmp_path / name).write_bytes((workspace.path / "data" / name).read_bytes())
    cuts = [0, 1, 8, 10, len(mixed)]
    for shard, (start, stop) in enumerate(pairwise(cuts)):
        write_records(tmp_path / f"other{shard}.tfrecord", mixed[start:stop], force=False)

    for model in models(forms, workspace, exported):
        assert_alike(predict(model, str(tmp_path)), predict(model, TEST))


def test_checkpoint_fused_and_onnx_file_score_the_same(predict, forms):
    expected = predict(forms["checkpoint"], TEST, "--repeats", "2")

    assert_alike(predict(forms["fused"], TEST, "--repeats", "2"), expected)
    assert_alike(predict(forms["onnx"], TEST), expected)
    once = predict(forms["checkpoint"], TEST)
    assert max(np.abs(once[video] - row).max() for video, row in expected.items()) > 1e-4


def test_checkpoint_fused_and_onnx_file_have_the_same_gap(runner, forms, workspace, monkeypatch):
    monkeypatch.chdir(workspace.path)

    found = {}
    for kind, path in forms.items():
        repeats = [] if kind == "onnx" else ["--repeats", "2"]
        result = runner.invoke(main, ["evaluate", str(path), TEST, *repeats, "--json"])
        assert result.exit_code == 0, result.output
        found[kind] = json.loads(result.stdout)

    assert found["checkpoint"]["videos"] == NUM_VIDEOS["test"]
    assert 0 < found["checkpoint"]["gap"] < 1
    assert found["fused"] == pytest.approx(found["checkpoint"], abs=1e-6)
    assert found["onnx"] == pytest.approx(found["checkpoint"], abs=1e-6)


def test_predictions_evaluate_to_the_score_of_the_model(
    runner, predict, exported, tmp_path, workspace
):
    predict(exported.path, TEST)

    of_file = runner.invoke(main, ["evaluate", str(tmp_path / "p.safetensors"), "--json"])
    of_model = runner.invoke(main, ["evaluate", str(exported.path), TEST, "--json"])

    assert json.loads(of_file.stdout) == pytest.approx(json.loads(of_model.stdout), abs=1e-9)


def test_a_csv_in_the_challenges_format_lists_the_best_classes(
    runner, predict, exported, workspace, tmp_path
):
    scores = predict(exported.path, TEST)
    output = tmp_path / "p.csv"

    result = runner.invoke(
        main, ["predict", str(exported.path), TEST, "-o", str(output), "--top-k", "2"]
    )

    assert (result.exit_code, result.stdout) == (0, f"{output}\n")
    printed = runner.invoke(
        main, ["predict", str(exported.path), TEST, "-o", "-", "--top-k", "2", "--quiet"]
    )
    assert (printed.exit_code, printed.stdout) == (0, output.read_text())
    header, *lines = output.read_text().splitlines()
    assert header == "VideoId,LabelConfidencePairs"
    assert [line.split(",")[0] for line in lines] == list(scores)
    for line in lines:
        video, pairs = line.split(",")
        row = scores[video]
        first, second = np.argsort(-row)[:2]
        assert pairs == f"{first} {row[first]:g} {second} {row[second]:g}"


def test_skipped_records_are_counted_at_the_end(runner, forms, own_workspace):
    shard = own_workspace.path / "data" / "test" / "test0001.tfrecord"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 0x40
    shard.write_bytes(content)

    for words in (["predict", "-o", "p.csv"], ["evaluate"]):
        refused = runner.invoke(main, [*words, str(forms["onnx"]), TEST])
        result = runner.invoke(main, [*words, str(forms["onnx"]), TEST, "--skip-bad-records"])

        assert refused.exit_code == 1
        assert f"{shard}, record {NUM_VIDEOS['test'] // 3}: its " in refused.stderr
        assert result.exit_code == 0, result.output
        assert result.stderr == "1 bad record was skipped.\n"
    assert len((own_workspace.path / "p.csv").read_text().splitlines()) == NUM_VIDEOS["test"]


def test_the_repeats_of_an_onnx_file_are_fixed(runner, forms, own_workspace):
    result = runner.invoke(
        main, ["predict", str(forms["onnx"]), TEST, "-o", "p.csv", "--repeats", "3"]
    )

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {forms['onnx']} was exported for 2 repeats; --repeats cannot change that.\n"
        "Leave --repeats out, or export the ensemble again with another --repeats.\n"
    )


def test_records_of_other_modalities_are_refused(runner, forms, own_workspace):
    runner.invoke(
        main,
        ["data", "synthesize", "other", "--modality", "rgb=8", "--classes", "6", "--test", "3"],
    )

    for model in forms.values():
        result = runner.invoke(main, ["predict", str(model), "other/test", "-o", "p.csv"])

        assert result.exit_code == 1
        assert result.stderr == (
            f"Error: {model} has rgb (7 uint8), audio (3 uint8), but these records have rgb (8 "
            "uint8).\nUse records with the same modalities, widths and value types.\n"
        )


def test_nothing_is_overwritten_without_force(runner, forms, own_workspace):
    (own_workspace.path / "p.csv").write_text("mine")

    result = runner.invoke(main, ["predict", str(forms["onnx"]), TEST, "-o", "p.csv"])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: p.csv exists already.\nName another output, or replace it with --force.\n"
    )
    assert (own_workspace.path / "p.csv").read_text() == "mine"


def test_the_file_to_write_is_not_optional(runner, forms, own_workspace):
    result = runner.invoke(main, ["predict", str(forms["onnx"]), TEST])

    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Missing option '-o' / '--output'.\n")


def test_a_member_is_predicted_as_the_fused_file_would_store_it(predict, workspace, fused):
    checkpoint = workspace.averaged("vlad")

    rounded = predict(checkpoint, TEST, "--dtype", "int4")

    plain = predict(checkpoint, TEST)
    assert any(np.abs(rounded[video] - plain[video]).max() > 1e-4 for video in plain)
    predictions = read_predictions(checkpoint.parent / "validation.safetensors")
    assert predictions.metadata.model.dtype is None
    with open_tensors(fused["int4"].path) as file, torch.inference_mode():
        metadata = file.metadata_as(FusedMetadata)
        member = next(each for each in metadata.members if each.name == "vlad")
        model = load_fused_member(file, member, metadata.data_schema)
    run = runner_of(model, model.draws_for("vlad", repeats=1), "cpu")
    for batch in Records([TEST]).batches(128):
        assert_alike(rounded, dict(zip(batch.ids, run(batch), strict=True)))


def test_predictions_name_the_precision_that_was_run(runner, workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace.path)
    output = tmp_path / "p.safetensors"

    words = ["predict", str(workspace.averaged("rnn")), TEST, "--dtype", "int8", "-o", str(output)]
    assert runner.invoke(main, words).exit_code == 0

    assert read_predictions(output).metadata.model.dtype == "int8"


@pytest.mark.parametrize(("kind", "what"), [("fused", "a fused"), ("onnx", "an ONNX")])
def test_an_ensembles_file_is_not_rounded_again(kind, what, runner, forms, own_workspace):
    result = runner.invoke(
        main, ["predict", str(forms[kind]), TEST, "-o", "p.csv", "--dtype", "int8"]
    )

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {forms[kind]} is {what} file, whose weights are rounded already; it cannot be run "
        "in int8.\nLeave out --dtype, or name a checkpoint.\n"
    )
    assert not (own_workspace.path / "p.csv").exists()


def test_a_finished_run_is_predicted_in_more_precisions(runner, own_workspace, monkeypatch):
    runs = own_workspace.path / "runs"
    words = ["train", "recipes/mean.toml", "recipes/rnn.toml", *TRAINING, "--keep", "4"]

    result = runner.invoke(main, [*words, "--predict-dtype", "int8,int4"])

    assert result.exit_code == 0, result.output
    assert result.stdout.count("was already finished") == 2
    for name, dtype in product(("mean", "rnn"), ("int8", "int4")):
        metadata = read_predictions(runs / name / f"validation-{dtype}.safetensors").metadata
        assert (metadata.name, metadata.model.dtype) == (name, dtype)
    result = runner.invoke(main, ["select", "--dtype", "auto", "--json", "--exclude", "bag"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["dtypes"]) == {"bf16", "int8", "int4"}
    result = runner.invoke(main, ["fuse"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["train", "select"])
def test_a_precision_that_is_none_is_refused(command, runner, own_workspace):
    words = {
        "train": ["train", "recipes/mean.toml", *TRAINING, "--predict-dtype", "int8,int3"],
        "select": ["select", "--dtype", "int8,int3"],
    }[command]

    result = runner.invoke(main, words)

    assert result.exit_code == 1
    option, end = ("--predict-dtype", "") if command == "train" else ("--dtype", ", or auto")
    assert result.stderr == (
        f"Error: 'int3' in {option} int8,int3 is no precision.\nName some of fp32, fp16, bf16, "
        f"int8, int4, with commas between{end}.\n"
    )
