"""A folder with predictions for each file of records: resumed, shared out, read as one, merged."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from builders import tiny_recipe, tiny_records, write_checkpoint

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.errors import CheckpointError, InputError, OutputError, PredictionsError
from ensemble_kit.files import sha256_of
from ensemble_kit.inference import evaluate_predictions, predict
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.predictions.folder import list_files
from ensemble_kit.predictions.merging import merge
from ensemble_kit.shards import Share, find_shards, predict_shards, shared_out

NUM_SHARDS = 4
PATIENCE = 200  # seconds until a process has imported PyTorch and predicted a file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of records in four files, and a model for them."""
    folder = tmp_path_factory.mktemp("data")
    schema = synthesize(
        folder,
        num_videos={"test": 40},
        modalities={"rgb": 8, "audio": 4},
        num_classes=5,
        frames=(2, 7),
        num_shards=NUM_SHARDS,
    )
    write_checkpoint(folder / "model.safetensors", tiny_recipe(), schema, name="mine")
    write_checkpoint(folder / "other.safetensors", tiny_recipe(), schema, seed=1)
    return folder


@pytest.fixture
def records(data):
    return Records([data / "test"])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_has_a_file_for_each_shard_and_is_read_as_one(data, records, tmp_path):
    model = data / "model.safetensors"
    done = predict_shards(model, records, tmp_path / "out", repeats=2, batch_size=10)

    names = [f"test{number:04d}.safetensors" for number in range(NUM_SHARDS)]
    assert (done.num_predicted, done.num_skipped) == (NUM_SHARDS, 0)
    assert sorted(contents(tmp_path / "out")) == ["predictions.json", *names]
    whole = read_predictions(predict(model, records, tmp_path / "p.safetensors", repeats=2,
                                     batch_size=10))  # fmt: skip
    folder = read_predictions(tmp_path / "out")
    assert folder.ids == whole.ids
    assert folder.name == "mine"
    assert (folder.rows(0, 40) == whole.rows(0, 40)).all()
    some = np.array([39, 0, 11, 10, 25])
    assert (folder.taken(some) == whole.taken(some)).all()
    assert evaluate_predictions(folder, None).gap == evaluate_predictions(whole, None).gap
    assert folder.metadata.dataset_sha256 == whole.metadata.dataset_sha256


def test_a_file_says_what_it_was_made_from(data, records, tmp_path):
    predict_shards(data / "model.safetensors", records, tmp_path, repeats=2)

    metadata = read_predictions(tmp_path / "test0001.safetensors").metadata

    assert metadata.model.file.sha256 == sha256_of(data / "model.safetensors")
    assert metadata.model.repeats == 2
    assert metadata.shard.name == "test0001.tfrecord"
    assert metadata.shard.content == records.fingerprints()[1].content
    assert not metadata.shard.skips_bad_records


def test_what_is_there_is_skipped_and_what_is_missing_is_predicted(data, records, tmp_path):
    model = data / "model.safetensors"
    predict_shards(model, records, tmp_path)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    missing = tmp_path / "test0002.safetensors"
    missing.unlink()

    done = predict_shards(model, records, tmp_path)

    assert (done.num_predicted, done.num_skipped) == (1, 3)
    assert contents(tmp_path) == before
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == [missing]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"repeats": 3}, "with other repeats"),
        ({"top_k": 2}, "with another --top-k"),
        ({"model": "other.safetensors"}, "by another model"),
        ({"skip": True}, "with another --skip-bad-records"),
    ],
)
def test_what_was_made_otherwise_is_refused_by_name(data, records, tmp_path, change, difference):
    predict_shards(data / "model.safetensors", records, tmp_path)
    before = contents(tmp_path)
    model = data / change.pop("model", "model.safetensors")
    if change.pop("skip", False):
        records = Records([data / "test"], skip_bad_records=True)

    with pytest.raises(OutputError) as caught:
        predict_shards(model, records, tmp_path, **change)

    shard = records.paths[0]
    assert str(caught.value) == (
        f"{tmp_path / 'test0000.safetensors'} exists already, and was made {difference}.\n"
        f"Name another folder, or predict {shard} again with --force."
    )
    assert contents(tmp_path) == before
    predict_shards(model, records, tmp_path, force=True, **change)
    assert read_predictions(tmp_path).metadata is not None


def test_records_that_have_changed_are_refused_by_name(data, tmp_path):
    _, records = tiny_records(tmp_path / "records")
    write_checkpoint(tmp_path / "model.safetensors", tiny_recipe(), records.schema)
    predict_shards(tmp_path / "model.safetensors", records, tmp_path / "out")
    first, second = records.paths
    second.write_bytes(first.read_bytes())

    with pytest.raises(OutputError) as caught:
        predict_shards(tmp_path / "model.safetensors", Records(records.patterns), tmp_path / "out")

    assert caught.value.problem == (
        f"{tmp_path / 'out' / 'validate0001.safetensors'} exists already, and was made from other "
        "records."
    )


def test_a_file_that_is_cut_short_is_refused_by_name(data, records, tmp_path):
    model, cut = data / "model.safetensors", tmp_path / "test0003.safetensors"
    predict_shards(model, records, tmp_path)
    cut.write_bytes(cut.read_bytes()[:-7])

    with pytest.raises(CheckpointError) as caught:
        predict_shards(model, records, tmp_path)

    assert caught.value.problem.startswith(f"{cut} is not a whole safetensors file")


def test_shards_fall_to_parts_by_their_names_alone(data, records, tmp_path):
    names = [f"test{number:04d}.tfrecord" for number in range(3000)]

    parts = [{name for name in names if Share(number, 7).has(name)} for number in range(1, 8)]

    assert set().union(*parts) == set(names)
    assert sum(map(len, parts)) == len(names)
    assert all(350 < len(part) < 510 for part in parts)
    for number in (1, 2):
        predict_shards(data / "model.safetensors", records, tmp_path, share=Share(number, 2))
        if number == 1:
            with pytest.raises(PredictionsError) as caught:
                read_predictions(tmp_path)
    assert " of 4 files, such as test000" in str(caught.value)
    assert caught.value.hint == (
        "Run the same `ensemble-kit predict` again; it resumes with what is missing."
    )
    assert len(read_predictions(tmp_path).ids) == 40


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "1", "a/b", "-1/2", "1/2/3", ""])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(InputError) as caught:
        Share.parse(text)

    assert str(caught.value) == (
        f"{text!r} is no share of the shards.\n"
        "Write --shard 1/8 for the first of eight, up to --shard 8/8."
    )
    assert Share.parse("2/8") == Share(2, 8)


def test_jobs_share_the_bytes(records, tmp_path):
    shards = find_shards(records, tmp_path)

    for count in (1, 2, 3, 9):
        parts = shared_out(shards, count)
        assert len(parts) == min(count, NUM_SHARDS)
        assert sorted((s for part in parts for s in part), key=lambda s: s.name) == shards
    assert [len(part) for part in shared_out(shards, 2)] == [2, 2]


def test_two_shards_of_one_name_are_refused(data, tmp_path):
    other = tmp_path / "other" / "test0000.tfrecord"
    other.parent.mkdir()
    other.write_bytes((data / "test" / "test0000.tfrecord").read_bytes())
    records = Records([data / "test", other])

    with pytest.raises(OutputError) as caught:
        find_shards(records, tmp_path)

    assert str(caught.value) == (
        f"{data / 'test' / 'test0000.tfrecord'} and {other} would both be written to "
        f"{tmp_path / 'test0000.safetensors'}.\nGive them a folder each, or rename one."
    )


def test_a_folder_without_a_list_and_one_of_two_models_are_refused(data, records, tmp_path):
    with pytest.raises(PredictionsError) as caught:
        read_predictions(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no folder of predictions: it holds no predictions.json.\n"
        "Name a predictions file, or a folder that `ensemble-kit predict` wrote."
    )
    predict_shards(data / "model.safetensors", records, tmp_path)
    predict_shards(data / "model.safetensors", records.alone(records.paths[3]), tmp_path,
                   repeats=2, force=True)  # fmt: skip

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


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_folder_is_merged_into_what_one_command_would_write(data, records, tmp_path, top_k):
    model = data / "model.safetensors"
    predict_shards(model, records, tmp_path / "out", top_k=top_k, batch_size=10)

    merged = merge(tmp_path / "out", tmp_path / "merged.safetensors")

    whole = predict(model, records, tmp_path / "p.safetensors", top_k=top_k, batch_size=10)
    assert merged.read_bytes() == whole.read_bytes()
    lines = merge(tmp_path / "out", tmp_path / "merged.csv", top_k=2)
    expected = predict(model, records, tmp_path / "p.csv", top_k=2, batch_size=10)
    assert lines.read_bytes() == expected.read_bytes()


def test_a_csv_does_not_list_more_than_the_folder_keeps(data, records, tmp_path):
    predict_shards(data / "model.safetensors", records, tmp_path / "out", top_k=2)

    with pytest.raises(PredictionsError) as caught:
        merge(tmp_path / "out", tmp_path / "merged.csv")

    assert str(caught.value) == (
        f"{tmp_path / 'out'} keeps 2 classes of each video, and 20 were asked for.\n"
        "Give --top-k 2, or predict again and keep more."
    )


def kill_at_random(command, folder, kills, seed):
    """Start a command again and again, each time killed with all its processes, then let it end."""
    moments = random.Random(seed)
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - start
    for path in folder.iterdir():
        path.unlink()
    for _ in range(kills):
        with killed(command):
            time.sleep(moments.uniform(0, seconds))
        check_whole(folder)
    subprocess.run(command, check=True, capture_output=True)


def kill_after_the_first_file(command, folder):
    """Start a command, kill it as soon as it has written a file, then let it end."""
    with killed(command) as process:
        until = time.monotonic() + PATIENCE
        while not list(folder.glob("*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.001)
    check_whole(folder)
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def killed(command):
    """Run a command beside the block, and kill it with all its processes when the block ends."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_whole(folder):
    """Read what is there, which is whole at every moment."""
    for path in folder.glob("*.safetensors"):
        assert read_predictions(path).metadata.shard.name == f"{path.stem}.tfrecord"


@pytest.mark.parametrize(
    ("jobs", "kill"),
    [
        pytest.param([], kill_after_the_first_file, id="after the first file"),
        pytest.param(
            [], partial(kill_at_random, kills=30, seed=0), id="often", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            ["--jobs", "2"],
            partial(kill_at_random, kills=30, seed=2),
            id="two jobs, often",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_kill_at_any_moment_loses_and_doubles_nothing(data, records, tmp_path, jobs, kill):
    predict_shards(data / "model.safetensors", records, tmp_path / "expected", batch_size=1)
    out = tmp_path / "killed"
    command = [
        sys.executable, "-m", "ensemble_kit", "predict", str(data / "model.safetensors"),
        str(data / "test"), "-o", f"{out}/", "--batch-size", "1", *jobs,
    ]  # fmt: skip

    kill(command, out)

    assert contents(out) == contents(tmp_path / "expected")
