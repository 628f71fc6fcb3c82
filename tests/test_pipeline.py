from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import contents_of, record_of, tiny_recipe, tiny_records

from ensemble_kit.averaging.average import Average
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError
from ensemble_kit.networks.loading import load
from ensemble_kit.pipeline import average_run, train
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.training import loop


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def finished(records, tmp_path_factory):
    training, validation = records
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return train(tiny_recipe(), training=training, validation=validation, folder=folder, keep=3)


def steps_of(paths):
    return [int(path.stem.removeprefix("step-")) for path in paths]


def test_a_run_ends_with_the_predictions_of_its_averaged_checkpoint(finished, records):
    run = finished.trained.folder

    assert read_predictions(run.validation).metadata.model.file.path == "averaged.safetensors"
    assert finished.averaged_gap == load(run.averaged).measure(records[1]).gap


@pytest.mark.parametrize(
    ("mean", "moving", "winner", "parents", "batch_norm"),
    [
        (0.8, 0.7, "the mean of 2 checkpoints", ["step-00000004", "step-00000006"], "recalibrate"),
        (0.7, 0.8, "the moving average", ["ema"], "recalibrate"),
        (0.6, 0.5, "checkpoint 4 alone", ["step-00000004"], "trained"),
    ],
)
def test_a_run_settles_on_what_is_best_on_the_validation_records(
    mean, moving, winner, parents, batch_norm, records, tmp_path, monkeypatch
):
    alone = iter([0.1, 0.65, 0.2])
    measure = loop.measure_together
    monkeypatch.setattr(
        loop,
        "measure_together",
        lambda *arguments, **options: replace(measure(*arguments, **options), gap=next(alone)),
    )
    monkeypatch.setattr(
        Average,
        "gap",
        lambda self, *_: mean if self.sources[0].path.stem.startswith("step") else moving,
    )
    training, validation = records

    finished = train(
        tiny_recipe(),
        training=training,
        validation=validation,
        folder=tmp_path / "tiny",
        ema=0.9,
    )

    run = finished.trained.folder
    record = record_of(run.averaged)
    assert finished.averaged == winner
    assert [Path(parent.path).stem for parent in record.averaged_from] == parents
    assert record.batch_norm == batch_norm
    assert finished.averaged_gap == load(run.averaged).measure(validation).gap
    if winner == "checkpoint 4 alone":
        alone = contents_of(run.checkpoint(4))
        assert all(
            torch.equal(alone[name], value) for name, value in contents_of(run.averaged).items()
        )
    assert sorted(path.name for path in run.path.glob("*.safetensors")) == [
        "averaged.safetensors",
        "ema.safetensors",
        "state.safetensors",
        "validation.safetensors",
    ]


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
        assert len(file.metadata_as(CheckpointMetadata).averaged_from) == len(steps)


def test_a_step_behind_the_last_checkpoint_is_refused(finished, tmp_path):
    run = finished.trained.folder

    with pytest.raises(CheckpointError) as caught:
        average_run(run, tmp_path / "averaged.safetensors", from_step=7)

    assert str(caught.value) == (
        f"{run.path} has no checkpoint from step 7 on; its last is step-00000006.\n"
        "Give --from-step an earlier step."
    )
