"""Predictions files: what is written is read back, and what is wrong is named with its hint."""

import gzip
import hashlib
import json

import numpy as np
import pytest
from candidate_builders import write_text
from predictions_builders import IDS, LABELS, MODEL, NAMES, ROWS, write

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import CheckpointError, PredictionsError
from ensemble_kit.predictions.challenge_csv import read_labels_csv
from ensemble_kit.predictions.file import is_predictions_file, read_predictions
from ensemble_kit.predictions.videos import dataset_sha256
from ensemble_kit.store.provenance import PredictionsMetadata
from ensemble_kit.store.tensor_files import open_tensors, save_tensors


def test_what_is_written_is_read_back(tmp_path):
    predictions = read_predictions(write(tmp_path / "validation.safetensors"))

    assert predictions.name == "gru"
    assert predictions.ids == IDS
    assert predictions.label_names == NAMES
    assert predictions.num_classes == 4
    assert not predictions.is_sparse
    assert predictions.labels.offsets.tolist() == [0, 2, 2, 3]
    assert predictions.labels.classes.tolist() == [0, 2, 3]
    assert predictions.metadata.model == MODEL
    np.testing.assert_array_equal(predictions.rows(0, 3), ROWS)
    np.testing.assert_array_equal(predictions.rows(1, 2), ROWS[1:2])


def test_blocks_cover_all_videos_in_order(tmp_path):
    predictions = read_predictions(write(tmp_path / "p.safetensors"))

    blocks = list(predictions.blocks(block_values=8))

    assert [videos for videos, _ in blocks] == [slice(0, 2), slice(2, 3)]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), ROWS)


def test_predictions_of_no_videos_are_read_back(tmp_path):
    path = tmp_path / "p.safetensors"

    write(path, ids=(), labels=LabelLists.from_lists([]), rows=ROWS[:0])

    assert read_predictions(path).ids == ()
    assert list(read_predictions(path).blocks()) == []


def test_the_best_classes_alone_are_read_back_with_what_bounds_the_others(tmp_path):
    found = read_predictions(write(tmp_path / "p", top_k=2))

    assert found.is_sparse
    assert found.knows_classes
    assert (found.num_classes, found.label_names, found.metadata.top_k) == (4, NAMES, 2)
    missing = -np.inf
    expected = [[0.5, missing, 1, missing], [0.125, missing, 0.75, missing],
                [missing, missing, ROWS[2, 2], ROWS[2, 3]]]  # fmt: skip
    np.testing.assert_array_equal(found.rows(0, 3), np.array(expected, np.float32))
    np.testing.assert_array_equal(found.taken(np.array([2, 0])), found.rows(0, 3)[[2, 0]])
    np.testing.assert_array_equal(found.source.bounds, ROWS[[0, 1, 2], [1, 1, 1]])
    for top_k in (4, 5):
        whole = read_predictions(write(tmp_path / f"{top_k}", top_k=top_k))
        assert not whole.is_sparse
        assert whole.metadata.top_k is None


def test_a_class_that_a_file_of_the_best_cannot_list_is_named(tmp_path):
    path = write(tmp_path / "p", top_k=2)
    with open_tensors(path) as file:
        metadata = file.metadata_as(PredictionsMetadata)
        arrays = {name: file.array(name) for name in file.specs}
    arrays["classes"] = arrays["classes"] + 3
    save_tensors(path, arrays, metadata, force=True)

    with pytest.raises(PredictionsError) as caught:
        read_predictions(path).rows(0, 3)

    assert str(caught.value) == (
        f"{path} lists a class outside of its 4 classes.\n"
        "Make the file again with `ensemble-kit predict`."
    )


def test_the_dataset_is_known_by_ids_and_labels_in_order(tmp_path):
    metadata = read_predictions(write(tmp_path / "p.safetensors")).metadata

    assert metadata.dataset_sha256 == dataset_sha256(IDS, LABELS)
    assert metadata.dataset_sha256 != dataset_sha256(IDS[::-1], LABELS)
    assert metadata.dataset_sha256 != dataset_sha256(IDS, LabelLists.from_lists([[0, 2], [3], []]))
    assert metadata.vocabulary_sha256 == hashlib.sha256(json.dumps(NAMES).encode()).hexdigest()


def test_a_predictions_file_is_known_by_its_content(tmp_path):
    own = write(tmp_path / "p.safetensors")
    renamed = own.rename(tmp_path / "p.bin")

    assert is_predictions_file(renamed)
    assert read_predictions(renamed).ids == IDS
    for name in ("p.csv", "p.CSV", "p.txt", "p.npy", "p.NPZ"):
        assert is_predictions_file(write_text(tmp_path / name, "anything"))
    assert is_predictions_file(write_text(tmp_path / "download", "VideoId,LabelConfidencePairs"))
    assert not is_predictions_file(write_text(tmp_path / "model.onnx", "anything"))


@pytest.mark.parametrize("name", ["p.CSV", "p.txt", "p"])
def test_a_csv_file_is_read_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbfVideoId,LabelConfidencePairs\r\na,1 0.5\r\n")

    predictions = read_predictions(path)

    assert (predictions.name, predictions.ids) == ("p", ("a",))


def test_a_gzipped_csv_file_is_read_as_what_it_holds(tmp_path):
    path = tmp_path / "p.csv.gz"
    path.write_bytes(gzip.compress(b"VideoId,LabelConfidencePairs\na,1 0.5\n"))
    labels = tmp_path / "labels"
    labels.write_bytes(gzip.compress(b"VideoId,Labels\na,1 3\n"))

    predictions = read_predictions(path)

    assert is_predictions_file(path)
    assert (predictions.name, predictions.ids) == ("p", ("a",))
    assert predictions.rows(0, 1).tolist() == [[-np.inf, 0.5]]
    ids, lists = read_labels_csv(labels)
    assert (ids, lists.classes.tolist()) == (("a",), [1, 3])


def test_a_gzipped_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "p.npz.gz"
    path.write_bytes(gzip.compress(b"anything"))

    for read in (is_predictions_file, read_predictions):
        with pytest.raises(PredictionsError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path} is compressed with gzip, and is no CSV file of predictions.\n"
            "Unpack it first, with gunzip."
        )


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for read, path in (
        (read_predictions, tmp_path / "none.csv"),
        (read_labels_csv, tmp_path / "none.csv"),
    ):
        with pytest.raises(PredictionsError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path} cannot be read: No such file or directory.\nName a file that you may read."
        )


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xff\xfe")

    with pytest.raises(PredictionsError) as caught:
        read_predictions(path)

    assert str(caught.value) == (
        f"{path} is not text in UTF-8.\nName a CSV file, or save it as UTF-8."
    )


def test_a_value_that_is_no_probability_is_named_when_read(tmp_path):
    path = write(tmp_path / "p.safetensors")
    with open_tensors(path) as file:
        tensors = {name: file.array(name) for name in file.specs}
        metadata = file.metadata_as(PredictionsMetadata)
    tensors["probabilities"][2, 1] = -1
    save_tensors(path, tensors, metadata, force=True)

    predictions = read_predictions(path)

    np.testing.assert_array_equal(predictions.rows(0, 2), ROWS[:2])
    with pytest.raises(PredictionsError) as caught:
        predictions.rows(1, 3)
    assert str(caught.value) == (
        f"{path}: class 1 of video 'três' is -1, expected a probability from 0 to 1.\n"
        "Predict again with a model that returns probabilities, not logits."
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("ids"),
        lambda tensors: tensors.update(ids=tensors["ids"][:-1]),
        lambda tensors: tensors.update(label_classes=tensors["label_classes"] + 1),
        lambda tensors: tensors.update(label_offsets=tensors["label_offsets"][:2]),
        lambda tensors: tensors.update(label_offsets=np.empty(0, np.int64)),
        lambda tensors: tensors.update(label_offsets=tensors["label_offsets"][None]),
        lambda tensors: tensors.update(probabilities=tensors["probabilities"][:2]),
        lambda tensors: tensors.update(probabilities=tensors["probabilities"][:, :3].copy()),
        lambda tensors: tensors.update(probabilities=tensors["probabilities"].astype(np.float64)),
    ],
)
def test_a_file_that_does_not_hold_what_it_describes_is_refused(tmp_path, damage):
    path = write(tmp_path / "p.safetensors")
    with open_tensors(path) as file:
        tensors = {name: file.array(name) for name in file.specs}
        metadata = file.metadata_as(PredictionsMetadata)
    damage(tensors)
    save_tensors(path, tensors, metadata, force=True)

    with pytest.raises(CheckpointError) as caught:
        read_predictions(path)

    assert str(caught.value) == (
        f"{path} does not hold the videos and labels that its metadata describes.\n"
        "Make the file again with `ensemble-kit predict`."
    )


@pytest.mark.parametrize(
    ("offsets", "classes"),
    [
        ([0, 3, 2, 3], [0, 2, 3]),  # falls
        ([1, 2, 2, 3], [0, 2, 3]),
        ([0, 2, 2, 4], [0, 2, 3]),
        ([0, 2, 2, 3], [0, 2, 4]),
        ([0, 2, 2, 3], [-1, 2, 3]),
        ([0, 2, 2, 3], [2, 0, 3]),
        ([0, 2, 2, 3], [2, 2, 3]),
    ],
)
def test_labels_that_are_no_lists_of_classes_are_refused_though_their_hash_agrees(
    tmp_path, offsets, classes
):
    path = write(tmp_path / "p.safetensors")
    labels = LabelLists(np.array(offsets), np.array(classes))
    with open_tensors(path) as file:
        tensors = {name: file.array(name) for name in file.specs}
        metadata = file.metadata_as(PredictionsMetadata)
    tensors |= {"label_offsets": labels.offsets, "label_classes": labels.classes}
    metadata = metadata.model_copy(update={"dataset_sha256": dataset_sha256(IDS, labels)})
    save_tensors(path, tensors, metadata, force=True)

    with pytest.raises(CheckpointError) as caught:
        read_predictions(path)

    assert str(caught.value) == (
        f"{path} does not hold the videos and labels that its metadata describes.\n"
        "Make the file again with `ensemble-kit predict`."
    )


def test_a_first_class_may_be_lower_than_the_last_of_the_video_before(tmp_path):
    lists = LabelLists.from_lists([[1, 3], [], [0]])

    assert read_predictions(write(tmp_path / "p", labels=lists)).labels.classes.tolist() == [
        1,
        3,
        0,
    ]
