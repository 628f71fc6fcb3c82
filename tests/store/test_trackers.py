"""Trackers: what each is given, what a resumed run goes on with, and what happens when one fails.

MLflow and Weights & Biases are tried for real where they are installed, each writing to a folder.
"""

import builtins
import json
import logging
import warnings
from pathlib import Path

import pytest

from ensemble_kit.choices import Tracker
from ensemble_kit.errors import TrainingError
from ensemble_kit.store import trackers as trackers_module
from ensemble_kit.store.run_log import MetricsLog, read_metrics
from ensemble_kit.store.trackers import LIBRARIES, open_trackers, require_trackers
from ensemble_kit.store.workspace import RunFolder

SETTINGS = {"recipe": "willow/gru", "training.batch_size": "80"}


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "willow-gru")
    folder.path.mkdir(parents=True)
    return folder


def log_of(run, *names, after_step=0):
    trackers = open_trackers(names, run, SETTINGS, after_step=after_step)
    return MetricsLog(run.metrics, trackers=trackers)


class Noted:
    """A tracker that keeps what it is given."""

    def __init__(self, run):
        self.run, self.lines, self.is_closed = run, [], False
        self.known_as = run.known_as or "run-7"

    def write(self, step, numbers):
        self.lines.append((step, numbers))

    def close(self):
        self.is_closed = True


class Failing(Noted):
    """A tracker whose server is down after the first line."""

    def write(self, step, numbers):
        super().write(step, numbers)
        if step > 1:
            raise ConnectionError("no route to host\nTraceback …")


@pytest.fixture
def stand_in(monkeypatch):
    """Have a class stand in for Weights & Biases; the list has what was made of it."""
    made = []

    def use(kind):
        def opened(run):
            made.append(kind(run))
            return made[-1]

        library = LIBRARIES["wandb"]._replace(module="json", open=opened)
        monkeypatch.setattr(trackers_module, "LIBRARIES", {**LIBRARIES, "wandb": library})
        return made

    return use


@pytest.fixture
def without(monkeypatch):
    def leave_out(module):
        whole = builtins.__import__

        def imported(name, *arguments, **options):
            if name == module:
                raise ModuleNotFoundError(name)
            return whole(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", imported)
        monkeypatch.setattr(trackers_module, "import_module", imported)

    return leave_out


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


def test_a_tracker_is_given_every_number_of_the_lines_and_what_the_run_was_asked_for(run, stand_in):
    made = stand_in(Noted)

    with log_of(run, "wandb", "wandb") as log:
        log.write(step=1, loss=2.5, epoch=0)
        log.write(step=4, validation={"gap": 0.5, "mAP": 0.25}, state="finished")

    (tracker,) = made
    assert tracker.run.settings == SETTINGS
    assert tracker.lines == [
        (1, {"loss": 2.5, "epoch": 0}),
        (4, {"validation/gap": 0.5, "validation/mAP": 0.25}),
    ]
    assert tracker.is_closed


def test_a_resumed_run_is_the_one_that_the_tracker_has_already(run, stand_in):
    made = stand_in(Noted)
    log_of(run, "wandb").close()
    assert json.loads(run.trackers.read_text("utf-8")) == {"wandb": "run-7"}

    log_of(run, "wandb", after_step=4).close()

    assert [(tracker.run.known_as, tracker.run.after_step) for tracker in made] == [
        (None, 0), ("run-7", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "[1]", '{"wandb": 7}', "\0"])
def test_names_that_are_damaged_begin_another_run_in_the_tracker(run, stand_in, text):
    made = stand_in(Noted)
    run.trackers.write_text(text)

    log_of(run, "wandb").close()

    assert made[0].run.known_as is None


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(run, stand_in, caplog):
    made = stand_in(Failing)

    with caplog.at_level(logging.WARNING), log_of(run, "wandb") as log:
        for step in (1, 2, 3):
            log.write(step=step, loss=1.0)

    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 3]
    assert [step for step, _ in made[0].lines] == [1, 2]
    assert caplog.messages == [
        "Failing failed and is left out from here on; metrics.jsonl has every line: no route to "
        "host"
    ]


def test_one_that_cannot_be_opened_is_an_error_and_closes_the_others(run, stand_in, monkeypatch):
    def refuse(run):
        raise PermissionError("api_key not configured.")

    made = stand_in(Noted)
    library = LIBRARIES["mlflow"]._replace(module="json", open=refuse)
    libraries = {**trackers_module.LIBRARIES, "mlflow": library}
    monkeypatch.setattr(trackers_module, "LIBRARIES", libraries)

    with pytest.raises(TrainingError) as caught:
        log_of(run, "wandb", "mlflow")

    assert str(caught.value) == (
        "MLflow cannot be opened: api_key not configured.\n"
        "Set MLFLOW_TRACKING_URI to a server that runs, or `pip install mlflow` for a local "
        "database, or leave --tracker mlflow out."
    )
    assert made[0].is_closed
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "module", "title"),
    [
        ("tensorboard", "torch.utils.tensorboard", "TensorBoard"),
        ("mlflow", "mlflow", "MLflow"),
        ("wandb", "wandb", "Weights & Biases"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(run, without, name, module, title):
    without(module)

    for require in (lambda: require_trackers([name]), lambda: log_of(run, name)):
        with pytest.raises(TrainingError) as caught:
            require()
        assert str(caught.value) == (
            f"{title} is not installed.\n"
            f"Run `pip install 'ensemble-kit[{name}]'`, or leave --tracker {name} out."
        )
    assert list(run.path.iterdir()) == []

    log_of(run).close()  # none is needed where none is asked for


def test_every_tracker_that_may_be_chosen_has_its_library():
    assert set(LIBRARIES) == set(Tracker.__args__)


def test_tensorboard_has_every_number_and_steps_that_are_taken_again_once(run):
    with log_of(run, "tensorboard") as log:
        log.write(step=2, loss=2.5, state="begun")
        for step in (4, 6):
            log.write(step=step, validation={"gap": 0.5})

    with log_of(run, "tensorboard", after_step=4) as log:
        log.write(step=6, validation={"gap": 0.75})

    assert scalars_of(run.tensorboard) == {
        "loss": [(2, 2.5)],
        "validation/gap": [(4, 0.5), (6, 0.75)],
    }


def test_mlflow_has_the_numbers_and_the_settings_and_a_resumed_run_goes_on(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(run.path.parents[1])
    mlflow.set_tracking_uri(Path("mlruns").absolute().as_uri())

    with log_of(run, "mlflow") as log:
        log.write(step=2, validation={"gap": 0.5})
    with log_of(run, "mlflow", after_step=2) as log:
        log.write(step=4, validation={"gap": 0.75}, state="finished")

    run_id = json.loads(run.trackers.read_text("utf-8"))["mlflow"]
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run_id, "validation/gap")
    assert [(value.step, value.value) for value in history] == [(2, 0.5), (4, 0.75)]
    kept = client.get_run(run_id)
    assert (kept.info.run_name, kept.info.status) == ("willow-gru", "FINISHED")
    assert kept.data.params == SETTINGS
    assert mlflow.active_run() is None


def test_weights_and_biases_writes_offline_into_the_runs_folder(run, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")

    for after_step in (0, 2):
        with log_of(run, "wandb", after_step=after_step) as log:
            log.write(step=after_step + 2, loss=1.5, validation={"gap": 0.5})
    wandb.teardown()  # waits for the process that writes the files

    name = json.loads(run.trackers.read_text("utf-8"))["wandb"]
    written = sorted(run.wandb.glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(written) == 2  # the parts of one run, which `wandb sync` joins
    for path in written:
        assert b"validation/gap" in path.read_bytes()
    assert capfd.readouterr() == ("", "")
