import pytest
from builders import tiny_recipe, tiny_records

from ensemble_kit.checkpoints import open_tensors
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError
from ensemble_kit.loading import load
from ensemble_kit.pipeline import average_run, train
from ensemble_kit.predictions import read_predictions
from ensemble_kit.provenance import CheckpointRecord


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def finished(records, tmp_path_factory):
    training, validation = records
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return train(tiny_recipe(), training=training, validation=validation, folder=folder)


def steps_of(paths):
    return [int(path.stem.removeprefix("step-")) for path in paths]


def test_a_run_ends_with_its_average_and_the_averages_predictions(finished, records):
    run = finished.trained.folder

    with open_tensors(run.averaged) as file:
        record = file.record(CheckpointRecord)
    assert [parent.path for parent in record.averaged_from] == [
        "checkpoints/step-00000004.safetensors",
        "checkpoints/step-00000006.safetensors",
    ]  # the recipe's average_last is 2
    assert record.batch_norm == "recalibrate"
    assert read_predictions(run.validation).record.model.file.path == "averaged.safetensors"
    assert finished.averaged_gap == load(run.averaged).measure(records[1]).gap


def test_without_validation_records_nothing_is_predicted(records, tmp_path):
    finished = train(tiny_recipe(), training=records[0], validation=None, folder=tmp_path / "tiny")

    assert finished.averaged_gap is None
    assert finished.trained.folder.averaged.exists()
    assert not finished.trained.folder.validation.exists()


def test_an_interrupted_run_is_not_averaged(records, tmp_path, monkeypatch):
    whole = Records.training_batches

    def training_batches(self, *arguments, **options):
        yield next(whole(self, *arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(Records, "training_batches", training_batches)

    finished = train(
        tiny_recipe(), training=records[0], validation=records[1], folder=tmp_path / "tiny"
    )

    assert finished.trained.is_stopped
    assert finished.averaged_gap is None
    assert not finished.trained.folder.averaged.exists()
    assert steps_of(finished.trained.folder.checkpoint_paths()) == [1]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 6]),
        ({"last": 1}, [6]),
        ({"last": 9}, [2, 4, 6]),
        ({"from_step": 5}, [6]),
        ({"last": 3, "from_step": 3}, [4, 6]),
    ],
)
def test_the_last_checkpoints_from_a_step_on_are_averaged(options, steps, finished, tmp_path):
    output = tmp_path / "averaged.safetensors"

    outcome = average_run(
        finished.trained.folder, output, batch_norm="last", even_if_worse=True, **options
    )

    assert steps_of(outcome.used) == steps
    with open_tensors(output) as file:
        assert len(file.record(CheckpointRecord).averaged_from) == len(steps)


def test_a_step_behind_the_last_checkpoint_is_refused(finished, tmp_path):
    run = finished.trained.folder

    with pytest.raises(CheckpointError) as caught:
        average_run(run, tmp_path / "averaged.safetensors", from_step=7)

    assert str(caught.value) == (
        f"{run.path} has no checkpoint from step 7 on; its last is step-00000006.\n"
        "Give --from-step an earlier step."
    )
