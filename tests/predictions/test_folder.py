"""What a folder of predictions lists, and what cannot be read as one."""

import json
import os
import threading

import pytest

from ensemble_kit.errors import CheckpointError, PredictionsError
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.predictions.folder import list_files
from ensemble_kit.shards import predict_shards


def test_a_folder_without_a_list_and_one_of_two_models_are_refused(shards, shard_records, tmp_path):
    with pytest.raises(PredictionsError) as caught:
        read_predictions(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no folder of predictions: it holds no predictions.json.\n"
        "Name a predictions file, or a folder that `ensemble-kit predict` wrote."
    )
    model = shards / "model.safetensors"
    last = shard_records.alone(shard_records.paths[3])
    predict_shards(model, shard_records, tmp_path)
    predict_shards(model, last, tmp_path, repeats=2, force=True)

    with pytest.raises(PredictionsError) as caught:
        read_predictions(tmp_path)

    assert str(caught.value) == (
        f"{tmp_path / 'test0003.safetensors'} was made with other repeats than "
        f"{tmp_path / 'test0000.safetensors'}.\n"
        "Remove what is out of date, and run the same `ensemble-kit predict` again."
    )
    (tmp_path / "predictions.json").write_text('{"files": ["../x.safetensors"]}')
    with pytest.raises(PredictionsError) as caught:
        read_predictions(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'predictions.json'} cannot be read as a list of predictions files.\n"
        "Remove it, and run the same `ensemble-kit predict` again."
    )


def test_processes_that_write_one_list_wait_for_each_other(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    thread = threading.Thread(target=list_files, args=(tmp_path, ["b.safetensors"]))

    thread.start()
    thread.join(0.2)
    is_waiting = thread.is_alive()
    (tmp_path / "predictions.json").write_text('{"files": ["a.safetensors"]}')
    os.close(handle)
    thread.join()

    assert is_waiting
    listed = json.loads((tmp_path / "predictions.json").read_text())
    assert listed == {"files": ["a.safetensors", "b.safetensors"]}


def test_a_file_of_a_folder_that_the_kit_did_not_write_is_named(shards, shard_records, tmp_path):
    model, other = shards / "model.safetensors", tmp_path / "test0002.safetensors"
    predict_shards(model, shard_records, tmp_path)
    other.write_text("VideoId,LabelConfidencePairs\na,1 0.5\n")

    for read in (lambda: read_predictions(tmp_path),
                 lambda: predict_shards(model, shard_records, tmp_path)):  # fmt: skip
        with pytest.raises(CheckpointError) as caught:
            read()
        assert caught.value.problem == f"{other} is not a safetensors file."
