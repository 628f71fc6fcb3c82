"""ensemble-kit evaluate on predictions that were made already."""

import json

import numpy as np
import pytest
from reference import gap_loops, hit_at_one_loops, map_loops, perr_loops

from ensemble_kit.cli import main
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.predictions.writing import write_predictions

POSITIVES = [{0, 2}, {1}, {2}]
SCORES = [[0.5, 0.25, 0.75, 0.125], [0.875, 0.75, 0.0, 0.5], [0.25, 0.5, 0.125, 1.0]]


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "validation.safetensors"
    write_predictions(
        path,
        ids=("a", "b", "c"),
        label_names=("w", "x", "y", "z"),
        labels=LabelLists.from_lists(map(sorted, POSITIVES)),
        rows=np.array(SCORES, np.float32),
        name="one",
        model=None,
        force=False,
    )
    return path


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("VideoId,Labels\nc,2\nb,1\na,0 2\n")
    return path


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("VideoId,LabelConfidencePairs\na,2 0.75 0 0.5\nb,0 0.875 1 0.75\nc,3 1 1 0.5\n")
    return path


def loops(scores, k):
    return {
        "k": k,
        "gap": float(gap_loops(scores, POSITIVES, k)),
        "hit_at_1": float(hit_at_one_loops(scores, POSITIVES)),
        "perr": float(perr_loops(scores, POSITIVES)),
        "map": float(map_loops(scores, POSITIVES, k)),
        "videos": 3,
        "positives": 4,
        "classes_with_positives": 3,
    }


def test_the_json_of_a_csv_is_that_of_the_loops(runner, predictions, labels):
    arguments = ["evaluate", str(predictions), "--labels", str(labels), "--top-k", "2", "--json"]

    result = runner.invoke(main, arguments)

    missing = -np.inf
    listed = [[0.5, missing, 0.75, missing], [0.875, 0.75, missing, missing]]
    listed.append([missing, 0.5, missing, 1.0])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == pytest.approx(loops(listed, 2))


def test_the_labels_in_a_file_of_ours_are_used_unless_others_are_named(runner, own, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("VideoId,Labels\na,2\nb,0\nc,3\n")

    inside = runner.invoke(main, ["evaluate", str(own), "--json"])
    named = runner.invoke(main, ["evaluate", str(own), "--labels", str(other), "--json"])

    assert json.loads(inside.stdout) == pytest.approx(loops(SCORES, 20))
    assert json.loads(named.stdout)["gap"] == 1.0


def test_the_table_is_for_people(runner, own):
    result = runner.invoke(main, ["evaluate", str(own)])

    expected = loops(SCORES, 20)
    assert result.stdout == (
        f"GAP@20                     {expected['gap']:.4f}\n"
        f"Hit@1                      {expected['hit_at_1']:.4f}\n"
        f"PERR                       {expected['perr']:.4f}\n"
        f"mAP@20                     {expected['map']:.4f}\n"
        "videos                          3\n"
        "positives                       4\n"
        "classes with positives          3\n"
    )


def test_labels_of_classes_that_no_video_lists_count_as_positives(runner, predictions, labels):
    labels.write_text("VideoId,Labels\na,0 2\nb,1\nc,2 6\n")

    result = runner.invoke(main, ["evaluate", str(predictions), "--labels", str(labels), "--json"])

    assert json.loads(result.stdout)["positives"] == 5


def test_predictions_without_labels_are_refused(runner, predictions, own, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("VideoId,Labels\na,\nb,\nc,\n")

    for arguments, lacking in (
        ([str(predictions)], predictions),
        ([str(own), "--labels", str(empty)], empty),
    ):
        result = runner.invoke(main, ["evaluate", *arguments])
        assert result.exit_code == 1
        assert result.stderr == (
            f"Error: {lacking} holds no labels.\n"
            "Name a CSV file of the videos' labels with --labels.\n"
        )


def test_a_video_without_labels_is_refused(runner, predictions, labels):
    labels.write_text("VideoId,Labels\na,0\nb,1\n")

    result = runner.invoke(main, ["evaluate", str(predictions), "--labels", str(labels)])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {labels} lacks video 'c', which {predictions} has.\n"
        "Make both files from the same videos; their order may differ.\n"
    )


def test_a_label_outside_of_the_classes_of_a_file_of_ours_is_refused(runner, own, labels):
    labels.write_text("VideoId,Labels\na,0\nb,4\nc,2\n")

    result = runner.invoke(main, ["evaluate", str(own), "--labels", str(labels)])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {labels}, line 3: '4' is not a class, expected a number from 0 to 3.\n"
        "Number the classes from 0, as the records' labels do.\n"
    )


def test_records_are_refused_beside_predictions(runner, own):
    result = runner.invoke(main, ["evaluate", str(own), "records.tfrecord"])

    assert result.exit_code == 2
    assert "A predictions file takes no DATA; only a model is run on records." in result.stderr


def test_whole_rankings_are_asked_for(runner, own):
    plain = runner.invoke(main, ["evaluate", str(own), "--json"])
    result = runner.invoke(main, ["evaluate", str(own), "--json", "--rankings"])
    text = runner.invoke(main, ["evaluate", str(own), "--rankings"])

    found = json.loads(result.stdout)
    # class 0 has its video in place 2, class 1 in place 1, and class 2 both of its in 1 and 2
    assert found["macro_map"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert {key: found[key] for key in json.loads(plain.stdout)} == json.loads(plain.stdout)
    assert f"mAP, whole rankings        {found['macro_map']:.4f}" in text.stdout


def test_whole_rankings_of_a_file_with_some_classes_are_refused(runner, predictions, labels):
    arguments = ["evaluate", str(predictions), "--labels", str(labels), "--rankings"]

    result = runner.invoke(main, arguments)

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {predictions} lists only some classes of each video, but whole rankings need "
        "all.\nPredict again without --top-k into a .safetensors file, or leave out --rankings.\n"
    )
