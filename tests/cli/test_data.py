import json

import numpy as np
import pytest
from example_bytes import byte_strings, integers, record

from ensemble_kit.cli import main
from ensemble_kit.data.tfrecord import write_records

SMALL = ["--modality", "rgb=5", "--modality", "audio=3", "--classes", "7", "--frames", "2:6"]
FEW = ["--train", "9", "--validate", "4", "--test", "0", "--shards", "2"]


@pytest.fixture
def folder(tmp_path, runner):
    result = runner.invoke(main, ["data", "synthesize", str(tmp_path / "records"), *SMALL, *FEW])
    assert result.exit_code == 0, result.output
    return tmp_path / "records"


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def test_synthesize_writes_what_was_asked_for(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))

    assert files == [
        "label_names.csv",
        "schema.toml",
        "train/train0000.tfrecord",
        "train/train0001.tfrecord",
        "validate/validate0000.tfrecord",
        "validate/validate0001.tfrecord",
    ]


def test_synthesize_overwrites_nothing_without_force(folder, runner):
    refused = runner.invoke(main, ["data", "synthesize", str(folder), *SMALL, *FEW])
    forced = runner.invoke(main, ["data", "synthesize", str(folder), *SMALL, *FEW, "--force"])

    assert (refused.exit_code, forced.exit_code) == (1, 0)
    assert refused.stderr == (
        f"Error: {folder}/schema.toml exists already.\n"
        "Name another output, or replace it with --force.\n"
    )
    assert forced.stdout == f"{folder}\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--modality", "rgb", "'rgb' is not a name and a width, such as rgb=1024."),
        ("--modality", "rgb=0", "'rgb=0' is not a name and a width, such as rgb=1024."),
        ("--modality", "Rgb=3", "'Rgb=3' is not a name and a width, such as rgb=1024."),
        (
            "--modality",
            "labels=3",
            "no modality may be named labels, as the models' files use it.",
        ),
        (
            "--modality",
            "rgb=1000001",
            "'rgb=1000001' is not a name and a width, such as rgb=1024.",
        ),
        (
            "--modality",
            f"rgb={'9' * 5000}",
            f"'rgb={'9' * 72}... is not a name and a width, such as rgb=1024.",
        ),
        ("--classes", "1000001", "1000001 is not in the range 1<=x<=1000000."),
        ("--frames", "1:1000001", "'1:1000001' is not a range of frames, such as 20:60."),
        ("--frames", "6:2", "'6:2' is not a range of frames, such as 20:60."),
        ("--frames", "0", "'0' is not a range of frames, such as 20:60."),
    ],
)
def test_synthesize_names_a_value_it_cannot_read(tmp_path, runner, option, value, message):
    result = runner.invoke(main, ["data", "synthesize", str(tmp_path / "a"), option, value])

    assert result.exit_code == 2
    assert result.stderr.endswith(f"Error: Invalid value for '{option}': {message}\n")


def test_one_number_of_frames_is_both_ends(tmp_path, runner):
    runner.invoke(main, ["data", "synthesize", str(tmp_path), *SMALL, *FEW, "--frames", "3"])

    result = runner.invoke(main, ["data", "info", "--json", str(tmp_path / "train")])

    assert json.loads(result.stdout)["frames"] == {"total": 27, "min": 3, "max": 3, "mean": 3.0}


def test_info_prints_the_figures_for_people(folder, runner):
    result = runner.invoke(main, ["data", "info", f"{folder}/train/*.tfrecord"])

    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert result.exit_code == 0
    assert lines["kind"] == "YouTube-8M frame level (2018)"
    assert lines["modalities"] == "rgb 5 uint8, audio 3 uint8"
    assert lines["files"] == "2"
    assert lines["records"] == "9"
    assert lines["frames"].endswith("on average")
    assert "steady 0" in lines["most"]


def test_info_prints_no_name_that_steers_a_terminal(folder, runner, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text(
        "index,name\n" + "".join(f'{index},"\u202e\x1b]0;x\x07{index}"\n' for index in range(7))
    )

    result = runner.invoke(
        main, ["data", "info", f"{folder}/train/*", "--label-names", str(names)], color=True
    )

    assert result.exit_code == 0, result.output
    assert result.stdout.replace("\n", "").isprintable()
    assert r"\u202e\x1b]0;x\x07" in result.stdout


def test_info_prints_the_same_figures_as_json(folder, runner):
    result = runner.invoke(main, ["data", "info", "--json", str(folder / "train")])

    summary = json.loads(result.stdout)
    assert summary["kind"] == "YouTube-8M frame level (2018)"
    assert summary["modalities"][1] == {
        "name": "audio", "key": "audio", "width": 3, "value_type": "uint8"
    }  # fmt: skip
    assert (summary["num_classes"], summary["files"], summary["records"]) == (7, 2, 9)
    assert summary["labels"]["total"] == sum(each["videos"] for each in summary["classes"])
    videos = [each["videos"] for each in summary["classes"]]
    assert videos == sorted(videos, reverse=True)


def test_check_reads_good_records(folder, runner):
    result = runner.invoke(main, ["data", "check", str(folder / "train"), f"{folder}/v*/*"])

    assert result.exit_code == 0
    assert result.stdout == "13 good records in 4 files\n"


def test_check_stops_at_a_bad_record(folder, runner):
    path = folder / "train" / "train0001.tfrecord"
    damage(path, 12)

    result = runner.invoke(main, ["data", "check", str(folder / "train")])

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {path}, record 1: its ")
    assert result.stderr.endswith(
        " bytes differ from their checksum.\n"
        "Copy the file again from where it is whole, or leave it out with --skip-bad-records.\n"
    )


def test_check_counts_each_problem_where_bad_records_are_skipped(folder, runner):
    damage(folder / "train" / "train0000.tfrecord", 12)
    damage(folder / "train" / "train0001.tfrecord", 0)
    path = folder / "validate" / "validate0000.tfrecord"
    damage(path, 0)
    patterns = [str(folder / "train"), str(folder / "validate")]

    result = runner.invoke(main, ["data", "check", "--skip-bad-records", *patterns])

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "5 good records in 4 files"
    assert lines[1] == (
        "2 with a file that is no TFRecord; the first: "
        f"{folder}/train/train0001.tfrecord, record 1: it does not start like a TFRecord."
    )
    assert lines[2].startswith(
        "1 with bytes that differ from their checksum; the first: "
        f"{folder}/train/train0000.tfrecord, record 1: its "
    )
    assert result.stderr == "3 bad records were skipped.\n"


def test_reading_options_reach_the_reader(folder, runner):
    schema = folder / "other.toml"
    text = (folder / "schema.toml").read_text()
    schema.write_text(text.replace("num_classes = 7", "num_classes = 8"))
    (folder / "label_names.csv").unlink()
    names = folder / "names.csv"
    names.write_text("index,name\n" + "".join(f"{i},class {i}\n" for i in range(8)))
    schema.write_text(schema.read_text().replace('label_names = "label_names.csv"\n', ""))
    damage(folder / "train" / "train0000.tfrecord", 8)

    reading = ["--no-crc", "--schema", str(schema), "--label-names", str(names)]
    result = runner.invoke(main, ["data", "info", "--json", *reading, str(folder / "train")])

    summary = json.loads(result.stdout)
    assert (summary["records"], summary["num_classes"]) == (9, 8)
    assert summary["classes"][0]["name"].startswith("class ")


def test_a_shard_whose_name_looks_like_an_option_is_read(folder, runner, monkeypatch):
    (folder / "train" / "--.tfrecord").write_bytes(
        (folder / "validate" / "validate0000.tfrecord").read_bytes()
    )
    monkeypatch.chdir(folder / "train")

    for arguments in (["./--.tfrecord"], ["--", "--.tfrecord"], ["--", "--*"]):
        result = runner.invoke(main, ["data", "check", *arguments])
        assert result.stdout == "2 good records in 1 file\n", result.output


@pytest.fixture
def unlabelled(tmp_path):
    """Two records of three: two as the challenge's test records are, one with labels."""
    frames = {"rgb": [byte_strings(bytes(4))], "audio": [byte_strings(bytes(2))]}
    contents = [
        record({"id": byte_strings(b"a")}, frames),
        record({"id": byte_strings(b"b")}, frames),
        record({"id": byte_strings(b"c"), "labels": integers([3])}, frames),
    ]
    write_records(tmp_path / "test.tfrecord", contents, force=False)
    return str(tmp_path / "test.tfrecord")


def test_records_without_labels_are_described(unlabelled, runner):
    result = runner.invoke(main, ["data", "info", unlabelled])

    assert result.exit_code == 0
    assert "unlabelled     2 records without a key of labels\n" in result.stdout
    result = runner.invoke(main, ["data", "info", "--json", unlabelled])
    assert json.loads(result.stdout)["unlabelled"] == 2


def test_records_without_labels_are_good_and_counted(unlabelled, runner):
    result = runner.invoke(main, ["data", "check", unlabelled])

    assert result.exit_code == 0
    assert result.stdout == (
        "3 good records in 1 file\n2 records without labels, as test records are\n"
    )


def test_check_says_the_same_as_json(folder, unlabelled, runner):
    path = folder / "train" / "train0001.tfrecord"
    damage(path, 12)

    words = ["data", "check", "--json", "--skip-bad-records", str(folder / "train")]
    found = json.loads(runner.invoke(main, words).stdout)

    (bad,) = found.pop("bad")
    assert found == {"good": 8, "unlabelled": 0, "files": 2, "repeated": 0, "repeats": []}
    assert (bad["kind"], bad["records"]) == ("bytes that differ from their checksum", 1)
    assert bad["first"].startswith(f"{path}, record 1: its ")


def test_check_names_ids_of_more_than_one_record_with_their_places(folder, runner):
    train, again = folder / "train" / "train0000.tfrecord", folder / "validate" / "again.tfrecord"
    again.write_bytes(train.read_bytes())
    train1 = folder / "train" / "train0001.tfrecord"

    words = ["data", "check", str(folder / "train"), str(folder / "validate")]
    result = runner.invoke(main, words)

    assert result.exit_code == 0
    assert result.stdout == (
        "17 good records in 5 files\n4 ids of more than one record; the first:\n"
    ) + "".join(
        f"  'train{n:06d}' in {train} (record {n + 1}), {again} (record {n + 1})\n"
        for n in range(4)
    )
    found = json.loads(runner.invoke(main, [*words, "--json"]).stdout)
    assert found["repeated"] == 4
    assert found["repeats"][0] == {
        "id": "train000000", "places": [[str(train), 1], [str(again), 1]]
    }  # fmt: skip
    assert str(train1) not in result.stdout


def test_convert_says_how_many_classes_a_stray_label_makes(runner, tmp_path):
    for video in ("a", "b"):
        np.save(tmp_path / f"{video}.npy", np.zeros((2, 3), np.float32))
    labels = tmp_path / "labels.csv"
    labels.write_text("VideoId,Labels\na,1\nb,999999\n")
    words = [tmp_path, "--labels", labels, "-o", tmp_path / "out", "--split", "all=1"]

    result = runner.invoke(main, ["data", "convert", *map(str, words)])

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1:] == ["all            2 videos", "classes        1,000,000"]
