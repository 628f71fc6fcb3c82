from pathlib import Path

import pytest

from ensemble_kit.errors import OutputError
from ensemble_kit.store.run_log import MetricsLog, read_metrics


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"

    with MetricsLog(path) as log:
        log.write(step=1, loss=2.5)
        log.sync()
        assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
        log.write(step=4, validation={"gap": 0.5}, state="finished")
    with MetricsLog(path) as log:
        log.write(step=5, loss=1.5)

    assert read_metrics(path) == [
        {"step": 1, "loss": 2.5},
        {"step": 4, "validation": {"gap": 0.5}, "state": "finished"},
        {"step": 5, "loss": 1.5},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_half_a_line_of_a_run_that_was_killed_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []

    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 4, "lo')

    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_line_that_finds_no_room_is_an_error_of_the_disk():
    with pytest.raises(OutputError) as caught, MetricsLog(Path("/dev/full")) as log:
        log.write(step=1, loss=2.5)

    assert str(caught.value) == (
        "/dev/full cannot be written: No space left on device.\n"
        "Free some space; the same command resumes from the last checkpoint."
    )
