"""ensemble-kit calibrate, and the tags of the file that it writes."""

import contextlib
import json
import re
import shutil

import numpy as np
import pytest

from ensemble_kit.cli import main
from ensemble_kit.errors import ProviderError
from ensemble_kit.files import sha256_of
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.report import page
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.model_card import model_card
from ensemble_kit.serving.onnx_file import is_whole, read_properties

KEY = "ensemble_kit.calibration"


@pytest.fixture(scope="module")
def files(exported, workspace, tmp_path_factory):
    """Return a folder with an exported file, its predictions, and the calibrated file."""
    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copy(exported.path, folder / "e.onnx")
    runner = CliRunner()
    for arguments in (
        [
            "predict",
            folder / "e.onnx",
            workspace.path / "data" / "validate" / "*.tfrecord",
            "-o",
            folder / "p.safetensors",
        ],
        ["calibrate", folder / "e.onnx", folder / "p.safetensors", "-o", folder / "c.onnx"],
    ):
        result = runner.invoke(main, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.stdout)
    return folder


def test_the_file_is_the_same_but_for_one_property(files):
    before, after = read_properties(files / "e.onnx"), read_properties(files / "c.onnx")

    assert is_whole(files / "c.onnx", read_properties(files / "c.onnx"))
    assert {key for key in after if after[key] != before.get(key)} == {
        KEY, "ensemble_kit.content_sha256"
    }  # fmt: skip
    size = (files / "c.onnx").stat().st_size - (files / "e.onnx").stat().st_size
    assert 0 < size - len(after[KEY]) < 50


def test_what_is_measured_is_printed(files, runner):
    lines = (files / "output.txt").read_text().splitlines()
    found = json.loads(read_properties(files / "c.onnx")[KEY])
    measured = found["measured"]

    gap, best = measured["gap"], measured["best_f1"]
    assert lines[0].startswith(f"{files / 'c.onnx'}: calibrated by {found['method']} on ")
    assert f"  GAP                         {gap['before']:.4f} -> {gap['after']:.4f}" in lines
    assert lines[-1].split() == [
        "best", "F1", f"{best['precision']:.4f}", f"{best['recall']:.4f}", f"{best['tags']:,}"
    ]  # fmt: skip
    losses = measured["log_loss"]
    assert losses[found["method"]] == min(losses.values())


def test_tags_are_the_classes_over_their_thresholds(files):
    ensemble = OnnxEnsemble(files / "c.onnx")
    found = json.loads(read_properties(files / "c.onnx")[KEY])
    names = json.loads(ensemble.metadata["label_names"])
    generator = np.random.default_rng(0)
    frames = {
        "rgb": generator.integers(0, 256, (5, 4, 7), np.uint8),
        "audio": generator.integers(0, 256, (5, 4, 3), np.uint8),
    }
    counts = np.array([4, 3, 2, 1, 4])
    probabilities = ensemble.run(frames, counts).probabilities

    for wished, thresholds in (
        (None, found["best_f1"]),
        (0.7, [row[found["levels"].index(0.7)] for row in found["thresholds"]]),
    ):
        tags = ensemble.tags(frames, counts, min_precision=wished)

        for video, row in zip(tags, probabilities, strict=True):
            expected = {names[c] for c, p in enumerate(row) if p >= thresholds[c]}
            assert {tag.label for tag in video} == expected
            assert [tag.confidence for tag in video] == sorted(
                (tag.confidence for tag in video), reverse=True
            )
            assert all(names[tag.class_index] == tag.label for tag in video)
            calibrated = ensemble.calibration.calibrated(row[None])[0]
            assert all(calibrated[tag.class_index] == tag.confidence for tag in video)


def test_a_file_may_be_calibrated_again(files, runner, tmp_path):
    again = tmp_path / "again.onnx"
    shutil.copy(files / "c.onnx", again)
    arguments = ["calibrate", again, files / "p.safetensors", "-o", again, "--force"]

    result = runner.invoke(main, [*map(str, arguments), "--method", "none"])

    assert result.exit_code == 0, result.output
    assert is_whole(again, read_properties(again))
    assert json.loads(read_properties(again)[KEY])["method"] == "none"
    assert again.read_bytes().count(KEY.encode()) == 1


def test_json_is_what_the_file_says(files, runner, tmp_path):
    arguments = ["calibrate", files / "e.onnx", files / "p.safetensors", "-o", tmp_path / "c.onnx"]

    result = runner.invoke(main, [*map(str, arguments), "--json"])

    found = json.loads(read_properties(tmp_path / "c.onnx")[KEY])
    assert json.loads(result.stdout) == {"method": found["method"], **found["measured"]}


def test_a_report_shows_how_far_probabilities_can_be_relied_on(
    files, chosen, tmp_path, monkeypatch
):
    monkeypatch.setattr(page, "bokeh_script", str)
    measured = json.loads(read_properties(files / "c.onnx")[KEY])["measured"]

    written = page.write_report(
        chosen.path, tmp_path / "report.html", calibrated=files / "c.onnx"
    ).read_text()

    after = measured["expected_calibration_error"]["after"]
    assert f"the expected calibration error is {after:.5f} in place of" in written
    drawn = re.search(r'data-chart="chart-reliability">(.*?)</script>', written)[1]
    means, gaps, pairs = measured["reliability"]["after"]
    sources = re.findall(r'\["mean",(\[.*?\])', drawn.replace(" ", ""))
    assert [mean for mean, count in zip(means, pairs, strict=True) if count] in [
        json.loads(source) for source in sources
    ]
    table = re.findall(r"<tr><td class=.text.>after</td>.*?</tr>", written)
    shares = [mean + gap for mean, gap, count in zip(means, gaps, pairs, strict=True) if count]
    assert len(table) == len(shares)
    assert all(f">{share:.4f}<" in line for line, share in zip(table, shares, strict=True))


def test_a_report_refuses_a_file_that_was_not_calibrated(files, chosen, tmp_path):
    with pytest.raises(ProviderError) as caught:
        page.write_report(chosen.path, tmp_path / "r.html", calibrated=files / "e.onnx")

    assert str(caught.value) == (
        f"{files / 'e.onnx'} was not calibrated.\nName a file that `ensemble-kit calibrate` wrote."
    )
    assert not (tmp_path / "r.html").exists()


def test_the_card_of_a_calibrated_file_says_what_its_tags_are_worth(files):
    card = (files / "README.md").read_text()
    found = json.loads(read_properties(files / "c.onnx")[KEY])
    measured = found["measured"]

    assert "# c\n" in card
    assert 'OnnxEnsemble("c.onnx").tags(frames, num_frames, min_precision=0.9)' in card
    error = measured["expected_calibration_error"]
    assert (
        f"expected calibration error {error['before']:.5f} before and {error['after']:.5f} after"
    ) in card
    assert f"Calibrated by `{found['method']}` on {measured['videos']} videos." in card
    for level in measured["levels"]:
        precision = "none" if level["precision"] is None else f"{level['precision']:.4f}"
        assert f"| {level['min_precision']:g} | {precision} | {level['recall']:.4f} |" in card
    assert "## Tags" not in model_card(files / "e.onnx", read_metadata(files / "e.onnx"), None)


def test_a_card_of_another_file_is_left_as_it_is(files, tmp_path, runner):
    for name in ("e.onnx", "p.safetensors"):
        shutil.copy(files / name, tmp_path)
    (tmp_path / "README.md").write_text("By hand.")
    words = ["calibrate", "e.onnx", "p.safetensors", "-o"]

    with contextlib.chdir(tmp_path):
        assert runner.invoke(main, [*words, "c.onnx"]).exit_code == 0
        assert (tmp_path / "README.md").read_text() == "By hand."
        write_card_by_kit = model_card(
            tmp_path / "e.onnx", read_metadata(tmp_path / "e.onnx"), None
        )
        (tmp_path / "README.md").write_text(write_card_by_kit)
        assert runner.invoke(main, [*words, "d.onnx"]).exit_code == 0
        assert (tmp_path / "README.md").read_text() == write_card_by_kit
        result = runner.invoke(main, [*words, "e.onnx", "--force"])
    assert result.exit_code == 0, result.output
    assert "## Tags" in (tmp_path / "README.md").read_text()


def refused(runner, *arguments):
    result = runner.invoke(main, ["calibrate", *map(str, arguments)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    return result.stderr.removeprefix("Error: ").splitlines()


def test_predictions_of_another_model_are_refused(files, exported_int4, runner, tmp_path):
    output = tmp_path / "c.onnx"

    lines = refused(runner, exported_int4.path, files / "p.safetensors", "-o", output)

    assert lines[0] == (
        f"{files / 'p.safetensors'} holds predictions of e.onnx, not of {exported_int4.path}."
    )
    assert not output.exists()


def test_predictions_of_some_classes_are_refused(files, runner, tmp_path):
    some = tmp_path / "some.csv"
    some.write_text("VideoId,LabelConfidencePairs\na,2 0.75 0 0.5\n")

    lines = refused(runner, files / "e.onnx", some, "-o", tmp_path / "c.onnx")

    assert lines == [
        f"{some} lists only some classes of each video; calibration needs all.",
        "Predict again without --top-k into a .safetensors file.",
    ]


@pytest.mark.parametrize(
    ("names", "ours", "theirs"),
    [
        (("a", "b", "c"), "has 3 classes", "have 6"),
        (tuple("fedcba"), "calls class 0 'f'", "call it '{}'"),
    ],
)
def test_other_classes_are_refused(files, runner, tmp_path, names, ours, theirs):
    predictions = tmp_path / "p.npz"
    np.savez(
        predictions,
        probabilities=np.full((2, len(names)), 0.5),
        ids=np.array(["a", "b"]),
        label_names=np.array(names),
    )

    lines = refused(runner, files / "e.onnx", predictions, "-o", tmp_path / "c.onnx")

    theirs = theirs.format(read_metadata(files / "e.onnx").label_names[0])
    assert lines == [
        f"{predictions} {ours}, but the members of {files / 'e.onnx'} {theirs}.",
        f"Write predictions with `ensemble-kit predict {files / 'e.onnx'} DATA -o FILE`.",
    ]
    assert not (tmp_path / "c.onnx").exists()


def test_a_half_without_labels_is_refused(files, runner, tmp_path):
    np.savez(
        tmp_path / "p.npz",
        probabilities=np.full((3, 6), 0.5),
        ids=np.array(["a", "b", "c"]),
        labels=np.zeros((3, 6), bool),
    )
    (tmp_path / "labels.csv").write_text("VideoId,Labels\na,1\nb,\nc,\n")

    lines = refused(
        runner, files / "e.onnx", tmp_path / "p.npz", "--labels", tmp_path / "labels.csv",
        "-o", tmp_path / "c.onnx",
    )  # fmt: skip

    assert lines[0].startswith(f"{tmp_path / 'p.npz'} leaves ")
    assert lines[0].endswith(", without any label.")
    assert lines[1] == "Predict more videos."


def test_a_damaged_model_is_not_copied(files, runner, tmp_path):
    damaged, output = tmp_path / "d.onnx", tmp_path / "c.onnx"
    content = bytearray((files / "e.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    probabilities = read_predictions(files / "p.safetensors")
    np.savez(
        tmp_path / "p.npz",
        probabilities=probabilities.rows(0, len(probabilities.ids)),
        ids=np.array(probabilities.ids),
        labels=probabilities.labels.dense(6),
    )

    lines = refused(runner, damaged, tmp_path / "p.npz", "-o", output)

    assert lines[0] == f"{damaged} does not have the bytes that were written."
    assert not output.exists()


def test_a_file_that_exists_is_kept(files, runner):
    before = sha256_of(files / "c.onnx")

    lines = refused(runner, files / "e.onnx", files / "p.safetensors", "-o", files / "c.onnx")

    assert lines[0] == f"{files / 'c.onnx'} exists already."
    assert sha256_of(files / "c.onnx") == before


def test_a_file_that_was_not_calibrated_gives_no_tags(exported):
    frames = {"rgb": np.zeros((1, 2, 7), np.uint8), "audio": np.zeros((1, 2, 3), np.uint8)}

    with pytest.raises(ValueError, match="was not calibrated; `ensemble-kit calibrate` writes one"):
        OnnxEnsemble(exported.path).tags(frames, np.array([2]))


def test_a_damaged_calibration_is_an_error_of_the_file(files):
    ensemble = OnnxEnsemble(files / "c.onnx")
    ensemble.metadata["calibration"] = "{}"

    with pytest.raises(ProviderError, match=r"c\.onnx: the calibration is damaged"):
        _ = ensemble.calibration
