"""ensemble-kit data convert."""

import json

from feature_files import write_labels, write_npz_table

from ensemble_kit.cli import main


def test_the_command_prints_what_it_wrote_and_the_error_of_quantising(tmp_path, runner):
    (features,) = write_npz_table(tmp_path)
    labels = write_labels(tmp_path / "labels.csv")
    words = ["data", "convert", str(features), "--labels", str(labels), "-o", f"{tmp_path}/out"]

    result = runner.invoke(main, [*words, "--split", "a=1", "--quantise"])

    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"{tmp_path}/out", "a              4 videos", "classes        3"]
    assert lines[3].startswith("rgb            quantisation error 0.0")
    assert lines[3].endswith("of the values lie outside -2 to 2")
    result = runner.invoke(main, [*words, "--json", "--force"])
    assert sum(json.loads(result.stdout)["videos"].values()) == 4
