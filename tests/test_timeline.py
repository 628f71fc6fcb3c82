"""predict --window, and the same of an exported file in Python."""

import csv
import json

import numpy as np
import pytest
from builders import tiny_recipe, tiny_records, write_checkpoint

from ensemble_kit.cli import main
from ensemble_kit.data.batch import collate
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.decode import Video
from ensemble_kit.networks.loading import load
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.timeline import predict_windows


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"), num_videos=24)[1]


@pytest.fixture
def model(records, tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, tiny_recipe(), records.schema)
    return path


def expected_windows(records, model, length, stride):
    """Cut each video by a loop, and run each piece alone."""
    loaded = load(model)
    for video in records.videos():
        for start in range(0, video.num_frames, stride):
            stop = min(start + length, video.num_frames)
            frames = {name: rows[start:stop] for name, rows in video.frames.items()}
            batch = collate([Video(video.id, video.classes, frames)], records.schema)
            yield video.id, start, stop, loaded.probabilities(batch)[0]


def test_each_window_is_predicted_as_a_video_of_its_own(records, model, tmp_path):
    output = predict_windows(
        model, records, tmp_path / "w.jsonl", window=3, stride=2, top_k=2, batch_size=7
    )

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    expected = list(expected_windows(records, model, 3, 2))
    assert len(lines) == len(expected)
    for line, (video, start, stop, row) in zip(lines, expected, strict=True):
        assert (line["video"], line["start"], line["end"]) == (video, start, stop)
        best = np.argsort(-row, kind="stable")[:2]
        assert [tag["class"] for tag in line["labels"]] == best.tolist()
        names = [records.schema.names[index] for index in best]
        assert [tag["label"] for tag in line["labels"]] == names
        confidences = [tag["confidence"] for tag in line["labels"]]
        assert confidences == pytest.approx(row[best], abs=2e-6)


def test_a_csv_has_classes_and_confidences(records, model, runner, tmp_path):
    output = tmp_path / "w.csv"
    arguments = ["predict", model, *records.paths, "--window", "4", "--top-k", "1", "-o", output]

    result = runner.invoke(main, [*map(str, arguments)])

    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    with output.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["VideoId", "start", "end", "labels"]
    for row, (video, start, stop, best) in zip(
        rows, expected_windows(records, model, 4, 4), strict=True
    ):
        index, confidence = row[3].split()
        assert row[:3] == [video, str(start), str(stop)]
        assert int(index) == best.argmax()
        assert float(confidence) == pytest.approx(best.max(), abs=2e-6)


def test_seconds_are_counted_in_the_schemas_frames(records, model, tmp_path):
    twice = records.schema.model_copy(update={"frames_per_second": 2.0})
    faster = Records(records.paths, schema=twice)

    output = predict_windows(model, faster, tmp_path / "w.jsonl", window=1.5, top_k=1)

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [(video, start / 2, stop / 2) for video, start, stop, _ in
                expected_windows(records, model, 3, 3)]  # fmt: skip
    assert [(line["video"], line["start"], line["end"]) for line in lines] == expected


def test_an_exported_file_says_the_same_of_each_window(exported, workspace, tmp_path):
    records = Records([str(workspace.path / "data" / "validate" / "*.tfrecord")])
    output = predict_windows(exported.path, records, tmp_path / "w.jsonl", window=2, top_k=6)
    lines = iter(output.read_text().splitlines())
    ensemble = OnnxEnsemble(exported.path)

    for video in records.videos():
        for start, end, tags in ensemble.run_windows(video.frames, window=2):
            line = json.loads(next(lines))
            assert (line["video"], line["start"], line["end"]) == (video.id, start, end)
            assert [tag["class"] for tag in line["labels"]] == tags.labels[0].tolist()
            assert [tag["confidence"] for tag in line["labels"]] == pytest.approx(
                tags.confidences[0], abs=2e-6
            )
    assert next(lines, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "w.safetensors"], "w.safetensors does not end in .csv or .jsonl, and windows"),
        (["-o", "w.csv", "--window", "0.5"], "A window of 0.5 s is less than a frame, of which "),
        (["-o", "w.csv", "--stride", "0.1"], "A stride of 0.1 s is less than a frame, of which "),
    ],
)
def test_what_cannot_be_written_is_refused(
    options, message, records, model, runner, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", model, *records.paths, "--window", "5", *options]

    result = runner.invoke(main, [*map(str, arguments)])

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {message}")
    assert not (tmp_path / "w.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "5", "-o", "w.csv"], "--stride is of windows; give --window too."),
        (["--window", "5", "-o", "w/"], "--window writes one file; name a .csv or .jsonl file."),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, records, model, runner):
    result = runner.invoke(main, ["predict", str(model), *map(str, records.paths), *options])

    assert result.exit_code == 2
    assert message in result.stderr
