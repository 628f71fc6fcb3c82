"""A folder with predictions for each file of records: resumed, shared out, read as one, merged."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from builders import tiny_recipe, tiny_records, write_checkpoint
from shards_fixture import NUM_SHARDS

from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError, InputError, OutputError, PredictionsError
from ensemble_kit.files import sha256_of
from ensemble_kit.inference import evaluate_predictions, predict
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.shards import Share, find_shards, predict_shards, shared_out

PATIENCE = 200  # seconds until a process has imported PyTorch and predicted a file


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_has_a_file_for_each_shard_and_is_read_as_one(shards, shard_records, tmp_path):
    model = shards / "model.safetensors"
    done = predict_shards(model, shard_records, tmp_path / "out", repeats=2, batch_size=10)

    names = [f"test{number:04d}.safetensors" for number in range(NUM_SHARDS)]
    assert (done.num_predicted, done.num_skipped) == (NUM_SHARDS, 0)
    assert sorted(contents(tmp_path / "out")) == ["predictions.json", *names]
    whole = read_predictions(predict(model, shard_records, tmp_path / "p.safetensors", repeats=2,
                                     batch_size=10))  # fmt: skip
    folder = read_predictions(tmp_path / "out")
    assert folder.ids == whole.ids
    assert folder.name == "mine"
    assert (folder.rows(0, 40) == whole.rows(0, 40)).all()
    some = np.array([39, 0, 11, 10, 25])
    assert (folder.taken(some) == whole.taken(some)).all()
    assert evaluate_predictions(folder, None).gap == evaluate_predictions(whole, None).gap
    assert folder.metadata.dataset_sha256 == whole.metadata.dataset_sha256


def test_a_file_says_what_it_was_made_from(shards, shard_records, tmp_path):
    predict_shards(shards / "model.safetensors", shard_records, tmp_path, repeats=2)

    metadata = read_predictions(tmp_path / "test0001.safetensors").metadata

    assert metadata.model.file.sha256 == sha256_of(shards / "model.safetensors")
    assert metadata.model.repeats == 2
    assert metadata.shard.name == "test0001.tfrecord"
    assert metadata.shard.content == shard_records.fingerprints()[1].content
    assert not metadata.shard.skips_bad_records


def test_what_is_there_is_skipped_and_what_is_missing_is_predicted(shards, shard_records, tmp_path):
    model = shards / "model.safetensors"
    predict_shards(model, shard_records, tmp_path)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    missing = tmp_path / "test0002.safetensors"
    missing.unlink()

    done = predict_shards(model, shard_records, tmp_path)

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
def test_what_was_made_otherwise_is_refused_by_name(
    shards, shard_records, tmp_path, change, difference
):
    predict_shards(shards / "model.safetensors", shard_records, tmp_path)
    before = contents(tmp_path)
    model = shards / change.pop("model", "model.safetensors")
    if change.pop("skip", False):
        shard_records = Records([shards / "test"], skip_bad_records=True)

    with pytest.raises(OutputError) as caught:
        predict_shards(model, shard_records, tmp_path, **change)

    shard = shard_records.paths[0]
    assert str(caught.value) == (
        f"{tmp_path / 'test0000.safetensors'} exists already, and was made {difference}.\n"
        f"Name another folder, or predict {shard} again with --force."
    )
    assert contents(tmp_path) == before
    predict_shards(model, shard_records, tmp_path, force=True, **change)
    assert read_predictions(tmp_path).metadata is not None


def test_records_that_have_changed_are_refused_by_name(tmp_path):
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


def test_a_file_that_is_cut_short_is_refused_by_name(shards, shard_records, tmp_path):
    model, cut = shards / "model.safetensors", tmp_path / "test0003.safetensors"
    predict_shards(model, shard_records, tmp_path)
    cut.write_bytes(cut.read_bytes()[:-7])

    with pytest.raises(CheckpointError) as caught:
        predict_shards(model, shard_records, tmp_path)

    assert caught.value.problem.startswith(f"{cut} is not a whole safetensors file")


def test_shards_fall_to_parts_by_their_names_alone(shards, shard_records, tmp_path):
    names = [f"test{number:04d}.tfrecord" for number in range(3000)]

    parts = [{name for name in names if Share(number, 7).has(name)} for number in range(1, 8)]

    assert set().union(*parts) == set(names)
    assert sum(map(len, parts)) == len(names)
    assert all(350 < len(part) < 510 for part in parts)
    for number in (1, 2):
        predict_shards(
            shards / "model.safetensors", shard_records, tmp_path, share=Share(number, 2)
        )
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


def test_jobs_share_the_bytes(shard_records, tmp_path):
    found = find_shards(shard_records, tmp_path)

    for count in (1, 2, 3, 9):
        parts = shared_out(found, count)
        assert len(parts) == min(count, NUM_SHARDS)
        assert sorted((s for part in parts for s in part), key=lambda s: s.name) == found
    assert [len(part) for part in shared_out(found, 2)] == [2, 2]


def test_two_shards_of_one_name_are_refused(shards, tmp_path):
    other = tmp_path / "other" / "test0000.tfrecord"
    other.parent.mkdir()
    other.write_bytes((shards / "test" / "test0000.tfrecord").read_bytes())
    records = Records([shards / "test", other])

    with pytest.raises(OutputError) as caught:
        find_shards(records, tmp_path)

    assert str(caught.value) == (
        f"{shards / 'test' / 'test0000.tfrecord'} and {other} would both be written to "
        f"{tmp_path / 'test0000.safetensors'}.\nGive them a folder each, or rename one."
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
def test_a_kill_at_any_moment_loses_and_doubles_nothing(
    shards, shard_records, tmp_path, jobs, kill
):
    predict_shards(shards / "model.safetensors", shard_records, tmp_path / "expected", batch_size=1)
    out = tmp_path / "killed"
    command = [
        sys.executable, "-m", "ensemble_kit", "predict", str(shards / "model.safetensors"),
        str(shards / "test"), "-o", f"{out}/", "--batch-size", "1", *jobs,
    ]  # fmt: skip

    kill(command, out)

    assert contents(out) == contents(tmp_path / "expected")
