"""predict --window, and the same of an exported file in Python."""

import csv
import json

import numpy as np
import pytest
from builders import tiny_recipe, tiny_records, tiny_schema, write_checkpoint
from example_bytes import byte_strings, rated_record

from ensemble_kit.cli import main
from ensemble_kit.data.batch import collate
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.decode import Video
from ensemble_kit.data.schema import write_schema
from ensemble_kit.data.tfrecord import write_records
from ensemble_kit.networks.loading import load
from ensemble_kit.predictions.file import read_predictions
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
        (["-o", "w.csv", "--window", "0.5"], "A window of 0.5 s is shorter than a frame; there "),
        (["-o", "w.csv", "--stride", "0.1"], "A stride of 0.1 s is shorter than a frame; there "),
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
        (["--stride", "5", "-o", "w.csv"], "--stride moves windows; give --window too."),
        (["--window", "5", "-o", "w/"], "--window writes one file; name a .csv or .jsonl file."),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, records, model, runner):
    result = runner.invoke(main, ["predict", str(model), *map(str, records.paths), *options])

    assert result.exit_code == 2
    assert message in result.stderr


def test_a_submission_of_segments_lists_the_best_windows_and_is_evaluated(
    records, model, runner, tmp_path
):
    output, classes = tmp_path / "s.csv", tmp_path / "classes.csv"
    classes.write_text("Index\n2\n0\n")
    data = [str(path) for path in records.paths]
    words = ["--segments", "--classes", str(classes), "-o", str(output)]

    result = runner.invoke(main, ["predict", str(model), *data, *words])

    assert result.exit_code == 0, result.output
    windows = list(expected_windows(records, model, 5, 5))
    lines = ["Class,Segments"]
    for index in (2, 0):
        order = sorted(range(len(windows)), key=lambda place: -windows[place][3][index])
        names = [f"{windows[place][0]}:{windows[place][1]}" for place in order]
        lines.append(f"{index},{' '.join(names)}")
    assert output.read_text().splitlines() == lines

    evaluated = runner.invoke(main, ["evaluate", str(output), *data])
    assert evaluated.exit_code == 1
    assert "no record has 'segment_labels'." in evaluated.stderr
    alone = runner.invoke(main, ["evaluate", str(output)])
    assert "Name the records that hold the segments' ratings as DATA." in alone.stderr


def test_a_submission_scores_by_the_ratings_in_records(runner, tmp_path):
    write_records(
        tmp_path / "a.tfrecord",
        [rated_record("v", [0, 5, 10], [1, 1, 1], [1, 0, 1])],
        force=False,
    )
    write_schema(tiny_schema(), tmp_path / "schema.toml", force=False)
    (tmp_path / "s.csv").write_text("Class,Segments\n1,v:0 v:5 v:10\n")

    words = ["evaluate", str(tmp_path / "s.csv"), str(tmp_path / "a.tfrecord")]
    result = runner.invoke(main, words)

    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "MAP@100,000             0.8333\n"
        "ratings                 3\n"
        "positives               2\n"
        "classes with positives  1\n"
    )
    found = json.loads(runner.invoke(main, [*words, "--json"]).stdout)
    assert found["map_at_k"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--classes", "c.csv", "-o", "s.csv"], "--classes says what --segments lists"),
        (["--segments", "--top-k", "3", "-o", "s.csv"], "--segments writes one .csv file"),
        (["--segments", "-o", "-"], "--segments writes one .csv file"),
    ],
)
def test_options_that_do_not_go_with_segments_are_refused(
    words, problem, records, model, runner, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.csv").write_text("0\n")

    result = runner.invoke(main, ["predict", str(model), str(records.paths[0]), *words])

    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.fixture
def rated(records, tmp_path):
    """Records of two videos of 12 frames with ratings of some segments of five."""
    generator = np.random.default_rng(0)
    schema = records.schema
    lists = {
        modality.key: [
            byte_strings(generator.integers(256, size=modality.width, dtype=np.uint8).tobytes())
            for _ in range(12)
        ]
        for modality in schema.modalities
    }
    made = [
        rated_record(name, starts, labels, scores, lists=lists)
        for name, starts, labels, scores in (
            ("v", [5, 0, 5, 10], [1, 1, 2, 0], [1, 0, 1, 1]),
            ("w", [0, 5], [2, 1], [0, 1]),
        )
    ]
    write_records(tmp_path / "rated.tfrecord", made, force=False)
    write_schema(schema, tmp_path / "schema.toml", force=False)
    return tmp_path / "rated.tfrecord"


def test_rated_segments_are_predicted_and_selected_by_map(rated, model, runner, tmp_path):
    output = tmp_path / "p.safetensors"
    words = ["predict", str(model), str(rated), "--rated-segments", "-o", str(output)]

    assert runner.invoke(main, words).exit_code == 0

    predictions = read_predictions(output)
    assert predictions.ids == ("v:0", "v:5", "v:10", "w:0", "w:5")
    own = [predictions.labels.rows(place, place + 1).classes.tolist() for place in range(5)]
    assert own == [[], [1, 2], [0], [], [1]]
    loaded, (first, _) = load(model), list(Records([rated]).videos())
    frames = {name: rows[5:10] for name, rows in first.frames.items()}
    batch = collate([Video("v:5", first.classes, frames)], Records([rated]).schema)
    np.testing.assert_allclose(predictions.rows(1, 2), loaded.probabilities(batch), atol=1e-6)

    selection = tmp_path / "selection.json"
    words = ["select", str(output), "--metric", "map-at-k", "-o", str(selection)]
    selected = runner.invoke(main, [*words, "--ratings", str(rated)])
    assert selected.exit_code == 0, selected.output
    rows = predictions.rows(0, 5)
    pairs = {0: [(2, True)], 1: [(0, False), (1, True), (4, True)], 2: [(1, True), (3, False)]}
    precisions = []
    for index, places in pairs.items():
        ranked = sorted(places, key=lambda pair: -rows[pair[0], index])
        hits = [rank for rank, (_, shown) in enumerate(ranked, 1) if shown]
        precisions.append(sum(n / rank for n, rank in enumerate(hits, 1)) / len(hits))
    found = json.loads(selection.read_text())
    assert found["score"] == pytest.approx(sum(precisions) / 3)
    assert "MAP@100,000" in selected.stdout
    assert "MAP counts segments that people have rated" in (
        runner.invoke(main, [*words, "--force"]).stderr
    )
    other = ["select", str(output), "--ratings", str(rated), "-o", str(selection), "--force"]
    assert "--ratings are of segments, and GAP does not" in runner.invoke(main, other).stderr


def test_a_segment_after_the_last_frame_is_a_bad_record(rated, model, runner, tmp_path):
    late = rated_record("x", [300], [1], [1], lists={
        modality.key: [byte_strings(bytes(modality.width))]
        for modality in Records([rated]).schema.modalities
    })  # fmt: skip
    write_records(rated, [late], force=True)
    words = ["predict", str(model), str(rated), "--rated-segments", "-o", str(tmp_path / "p")]

    refused = runner.invoke(main, [*words[:-1], f"{tmp_path}/p.safetensors"])

    assert refused.exit_code == 1
    assert "record 1: a segment starts at 300 s, after the last frame." in refused.stderr
