"""The examples, whole, on a few of the real records."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def few_records(source, target, *, shards):
    """Link some shards of each split of ``source`` into ``target``."""
    for split in ("train", "validate", "test"):
        (target / split).mkdir(parents=True)
        chosen = sorted((source / split).glob("*.tfrecord"))[:shards]
        assert chosen
        for path in chosen:
            (target / split / path.name).symlink_to(path)


def run_quickly(script, data, out):
    environment = os.environ | {
        "QUICK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [EXAMPLES / script, data, out], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("script", "records", "names", "shards"),
    [
        ("audioset.sh", "audioset/frame", "audioset/class_labels_indices.csv", 20),
        pytest.param(  # the same stages
            "youtube8m_video.sh",
            "yt8m/video",
            "yt8m/label_names_2018.csv",
            1,
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_an_example_ends_with_a_table_of_every_model(
    real_data, tmp_path, script, records, names, shards
):
    few_records(real_data / records, tmp_path / "data" / records, shards=shards)
    (tmp_path / "data" / names).symlink_to(real_data / names)
    out = tmp_path / "out"

    printed = run_quickly(script, tmp_path / "data", out)

    *rows, page = printed[printed.rindex("$ ensemble-kit report") :].splitlines()[2:]
    assert page == "ensemble/report.html: open it in a browser."
    forms = {tuple(re.split(r"  +", row)[:2]) for row in rows}
    runs = {folder.name for folder in (out / "runs").iterdir()}
    assert len(runs) >= 4
    assert forms == {
        *((run, form) for run in runs for form in ("last checkpoint", "averaged")),
        *(("ensemble", form) for form in ("fused fp32", "fused bf16", "fused int8", "onnx")),
    }
    stages = [line.split("\t")[0] for line in (out / "seconds.tsv").read_text().splitlines()]
    assert stages[-13:] == [
        "select", "fuse fp32", "fuse bf16", "fuse int8", "export", "export once",
        "select bf16", "fuse bf16", "evaluate bf16", "select auto", "fuse auto", "evaluate auto",
        "report",
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["audioset.sh", "youtube8m_video.sh"])
def test_an_example_says_how_it_is_called(script):
    done = subprocess.run([EXAMPLES / script], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr == f"usage: {EXAMPLES / script} DATA OUT\n"
