import builtins
import warnings
from pathlib import Path

import pytest

from ensemble_kit.errors import OutputError, TrainingError
from ensemble_kit.store.run_log import MetricsLog, read_metrics


@pytest.fixture
def without_tensorboard(monkeypatch):
    whole = builtins.__import__

    def imported(name, *arguments, **options):
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError(name)
        return whole(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", imported)


def scalars_of(folder):
    """Return (step, value) of every scalar by its name, as TensorBoard itself reads them."""
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {
        name: [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] for name in names
    }


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"

    with MetricsLog(path) as log:
        log.write(step=1, loss=2.5)
        log.sync()
        assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
        log.write(step=4, validation={"gap": 0.5}, state="finished")
    with MetricsLog(path, after_step=4) as log:
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


def test_tensorboard_has_every_number_of_the_lines(tmp_path):
    folder = tmp_path / "tensorboard"

    with MetricsLog(tmp_path / "metrics.jsonl", tensorboard=folder) as log:
        log.write(step=1, loss=2.5, epoch=0)
        log.write(step=4, validation={"gap": 0.5, "mAP": 0.25}, state="finished")
        assert scalars_of(folder) == {
            "loss": [(1, 2.5)], "epoch": [(1, 0)], "validation/gap": [(4, 0.5)],
            "validation/mAP": [(4, 0.25)],
        }  # fmt: skip


def test_steps_that_are_taken_again_are_once_in_tensorboard(tmp_path):
    path, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    with MetricsLog(path, tensorboard=folder) as log:
        for step in (2, 4, 6):
            log.write(step=step, loss=1.0)

    with MetricsLog(path, tensorboard=folder, after_step=4) as log:
        for step in (5, 6):
            log.write(step=step, loss=3.0)

    assert scalars_of(folder) == {"loss": [(2, 1.0), (4, 1.0), (5, 3.0), (6, 3.0)]}


def test_tensorboard_that_is_not_installed_is_named(tmp_path, without_tensorboard):
    with pytest.raises(TrainingError) as caught:
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")

    assert str(caught.value) == (
        "TensorBoard is not installed.\n"
        "Run `pip install 'ensemble-kit[tensorboard]'`, or leave --tensorboard out."
    )
    assert list(tmp_path.iterdir()) == []

    MetricsLog(tmp_path / "metrics.jsonl").close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_line_that_finds_no_room_is_a_fault_of_the_disk():
    with pytest.raises(OutputError) as caught, MetricsLog(Path("/dev/full")) as log:
        log.write(step=1, loss=2.5)

    assert str(caught.value) == (
        "/dev/full cannot be written: No space left on device.\n"
        "Free some space; the same command resumes from the last checkpoint."
    )
