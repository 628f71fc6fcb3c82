import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import contents_of, metadata_of, tiny_recipe, tiny_records

from ensemble_kit import pipeline
from ensemble_kit.averaging.average import Average
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError, TrainingError
from ensemble_kit.files import sha256_of
from ensemble_kit.inference import predict
from ensemble_kit.networks.loading import load
from ensemble_kit.pipeline import average_run, train
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.training import loop, train_checkpoints
from ensemble_kit.training.plan import RunPlan


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def finished(records, tmp_path_factory):
    return train(plan_of(records, tmp_path_factory.mktemp("runs") / "tiny", keep=3))


def plan_of(records, folder, *, is_validated=True, recipe=None, **options):
    training, validation = records
    return RunPlan(
        recipe=recipe or tiny_recipe(),
        training=training,
        validation=validation if is_validated else None,
        folder=folder,
        **options,
    )


def averages_have(monkeypatch, *, mean, moving):
    """Let averages be measured as always, and then have these GAPs."""
    gap_of = Average.gap

    def gap(self, *arguments):
        gap_of(self, *arguments)
        return mean if self.sources[0].path.stem.startswith("step") else moving

    monkeypatch.setattr(Average, "gap", gap)


def steps_of(paths):
    return [int(path.stem.removeprefix("step-")) for path in paths]


def test_a_run_ends_with_the_predictions_of_its_averaged_checkpoint(finished, records):
    run = finished.trained.folder

    assert read_predictions(run.validation).metadata.model.file.path == "averaged.safetensors"
    assert finished.averaged_gap == load(run.averaged).measure(records[1]).gap


def test_the_predictions_are_those_that_predict_would_write(finished, records, tmp_path):
    run = finished.trained.folder
    expected = run.path / "expected.safetensors"

    predict(run.averaged, records[1], expected)

    assert run.validation.read_bytes() == expected.read_bytes()
    expected.unlink()


@pytest.mark.parametrize(("options", "averages"), [({}, 1), ({"ema": 0.9}, 2)])
def test_each_average_runs_once_over_the_validation_records(
    options, averages, records, tmp_path, monkeypatch
):
    averages_have(monkeypatch, mean=0.98, moving=0.99)
    passes = []
    batches = Records.batches
    monkeypatch.setattr(
        Records, "batches", lambda self, *a, **o: passes.append(self) or batches(self, *a, **o)
    )
    monkeypatch.setattr(pipeline, "read_predictions", lambda _: pytest.fail("read again"))

    finished = train(plan_of(records, tmp_path / "tiny", **options))

    assert finished.averaged_gap >= 0.98
    assert passes == [records[1]] * (3 + averages)  # three checkpoints while it trains


def test_a_checkpoint_that_is_gone_is_named_and_no_average_of_the_rest_is_made(records, tmp_path):
    plan = plan_of(records, tmp_path / "tiny")
    trained = train_checkpoints(plan)
    gone = plan.run.checkpoint(4)
    gone.unlink()

    with pytest.raises(TrainingError) as caught:
        train(plan)

    assert gone in trained.checkpoints
    assert str(caught.value) == (
        f"{gone} is gone, which the run needs to settle on its best weights.\n"
        "Put it back, or train the run again with --force."
    )
    assert not plan.run.averaged.exists()


def test_a_folder_that_is_removed_while_checkpoints_are_averaged_is_an_error(
    records, tmp_path, monkeypatch
):
    averages_have(monkeypatch, mean=0.98, moving=0.99)
    plan = plan_of(records, tmp_path / "tiny")
    average = pipeline.average_run

    def average_and_lose(run, *arguments, **options):
        outcome = average(run, *arguments, **options)
        shutil.rmtree(run.path)
        return outcome

    monkeypatch.setattr(pipeline, "average_run", average_and_lose)

    with pytest.raises(TrainingError) as caught:
        train(plan)

    assert str(caught.value) == (
        f"{tmp_path / 'tiny'} was removed or replaced while its checkpoints were averaged.\n"
        "Give the same command again, and leave the folder in place until it ends."
    )


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
    averages_have(monkeypatch, mean=mean, moving=moving)

    finished = train(plan_of(records, tmp_path / "tiny", ema=0.9))

    run = finished.trained.folder
    metadata = metadata_of(run.averaged)
    assert finished.averaged == winner
    assert [Path(parent.path).stem for parent in metadata.averaged_from] == parents
    assert metadata.batch_norm == batch_norm
    assert finished.averaged_gap == max(mean, moving, 0.65)
    expected = tmp_path / "expected.safetensors"
    predict(run.averaged, records[1], expected)
    written = read_predictions(run.validation)
    assert (written.rows(0, 40) == read_predictions(expected).rows(0, 40)).all()
    assert written.metadata.model.file.sha256 == sha256_of(run.averaged)
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
    finished = train(plan_of(records, tmp_path / "tiny", is_validated=False))

    assert finished.averaged_gap is None
    assert finished.trained.folder.averaged.exists()
    assert not finished.trained.folder.validation.exists()


def test_an_interrupted_run_is_not_averaged(records, tmp_path, monkeypatch):
    whole = Records.training_batches

    def training_batches(self, *arguments, **options):
        yield next(whole(self, *arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(Records, "training_batches", training_batches)

    finished = train(plan_of(records, tmp_path / "tiny"))

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


def test_a_step_after_the_last_checkpoint_is_refused(finished, tmp_path):
    run = finished.trained.folder

    with pytest.raises(CheckpointError) as caught:
        average_run(run, tmp_path / "averaged.safetensors", from_step=7)

    assert str(caught.value) == (
        f"{run.path} has no checkpoint from step 7 on; its last is step-00000006.\n"
        "Give --from-step an earlier step."
    )


def test_one_checkpoint_whose_batch_norm_is_estimated_again_is_said_to_be_that(
    records, tmp_path, monkeypatch
):
    averages_have(monkeypatch, mean=1.0, moving=0.0)

    finished = train(plan_of(records, tmp_path / "tiny", recipe=tiny_recipe(max_steps=2)))

    assert finished.averaged == "checkpoint 2 alone with its batch norm estimated again"
