import os
import shutil
from itertools import permutations

import numpy as np
import pytest
import torch
from builders import (
    contents_of,
    metadata_of,
    rewrite_checkpoint,
    tiny_model,
    tiny_recipe,
    tiny_records,
    tiny_schema,
    write_checkpoint,
)

from ensemble_kit.averaging import average as averages
from ensemble_kit.averaging.recalibration import recalibrate
from ensemble_kit.averaging.stage import AveragedRun, average_checkpoints
from ensemble_kit.errors import CheckpointError, OutputError, PredictionsError
from ensemble_kit.files import sha256_of
from ensemble_kit.store.provenance import TrainingStateMetadata
from ensemble_kit.store.tensor_files import save_tensors

SCHEMA = tiny_schema()
STATISTICS = ("running_mean", "running_variance")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))[0]


@pytest.fixture
def checkpoints(tmp_path):
    """Three checkpoints of one run, whose weights differ."""
    paths = [tmp_path / f"step-{step}.safetensors" for step in (2, 4, 6)]
    for seed, path in enumerate(paths):
        write_checkpoint(path, tiny_recipe(), SCHEMA, seed=seed, step=2 * seed + 2)
    return paths


def message_of(paths, output, **options):
    with pytest.raises(CheckpointError) as caught:
        average_checkpoints(paths, output, **options)
    assert not output.exists()
    return str(caught.value)


def test_every_floating_tensor_is_the_mean_over_the_files(checkpoints, tmp_path):
    output = tmp_path / "averaged.safetensors"

    outcome = average_checkpoints(checkpoints, output, batch_norm="average")

    assert outcome == AveragedRun(
        path=output,
        method="uniform",
        batch_norm="average",
        used=tuple(checkpoints),
        gap=None,
        best=None,
        best_gap=None,
        is_better=None,
        steps=(),
    )
    assert outcome.description == "the mean of 3 checkpoints"
    files, averaged = [contents_of(path) for path in checkpoints], contents_of(output)
    assert averaged.keys() == files[0].keys()
    for name, tensor in averaged.items():
        for index in np.ndindex(*tensor.shape):
            total = np.float64(0)
            for file in files:
                total += np.float64(file[name][index])
            assert tensor[index].item() == np.float32(total / 3)


def test_last_keeps_the_statistics_of_the_last_step_and_averages_the_rest(checkpoints, tmp_path):
    mean, last = tmp_path / "mean.safetensors", tmp_path / "last.safetensors"
    average_checkpoints(checkpoints, mean, batch_norm="average")

    average_checkpoints(checkpoints, last, batch_norm="last")

    newest = contents_of(checkpoints[-1])
    for name, tensor in contents_of(last).items():
        source = newest if name.endswith(STATISTICS) else contents_of(mean)
        assert torch.equal(tensor, source[name]), name
    assert sum(name.endswith(STATISTICS) for name in newest) == 8


@pytest.mark.parametrize("batch_norm", ["average", "last"])
def test_the_order_of_the_files_changes_nothing(batch_norm, checkpoints, tmp_path):
    outputs = []
    for number, paths in enumerate(permutations(checkpoints)):
        outputs.append(tmp_path / f"{number}.safetensors")
        average_checkpoints(paths, outputs[-1], batch_norm=batch_norm)

    assert len({output.read_bytes() for output in outputs}) == 1


def test_the_record_names_the_parents_and_the_rule(checkpoints, tmp_path):
    output = tmp_path / "elsewhere" / "averaged.safetensors"

    average_checkpoints(checkpoints, output, batch_norm="last")

    metadata = metadata_of(output)
    assert [parent.path for parent in metadata.averaged_from] == [
        f"../step-{step}.safetensors" for step in (2, 4, 6)
    ]
    assert [parent.sha256 for parent in metadata.averaged_from] == list(map(sha256_of, checkpoints))
    assert metadata.batch_norm == "last"
    assert metadata.step == 6
    assert metadata.recipe == tiny_recipe().metadata
    assert metadata.run == metadata_of(checkpoints[0]).run


def test_integer_buffers_take_the_largest(checkpoints, tmp_path):
    for count, path in zip((3, 9, 5), checkpoints, strict=True):
        rewrite_checkpoint(path, contents_of(path) | {"count": torch.tensor([count])})

    average_checkpoints(checkpoints, tmp_path / "averaged.safetensors", batch_norm="average")

    assert contents_of(tmp_path / "averaged.safetensors")["count"].tolist() == [9]


def test_an_averaged_checkpoint_has_the_mean_weights_and_recalibrated_statistics(
    training, tmp_path
):
    paths = [tmp_path / f"step-{step}.safetensors" for step in (2, 4)]
    for seed, path in enumerate(paths):
        write_checkpoint(path, tiny_recipe(), training.schema, seed=seed, step=2 * seed + 2,
                         training_files=training.patterns)  # fmt: skip
    outputs = [tmp_path / f"{name}.safetensors" for name in ("mean", "given", "recorded")]
    average_checkpoints(paths, outputs[0], batch_norm="average")

    average_checkpoints(paths, outputs[1], training=training)
    average_checkpoints(paths, outputs[2])

    mean, given, recorded = map(contents_of, outputs)
    expected = tiny_model(tiny_recipe(), training.schema)
    expected.load_state_dict(mean)
    recalibrate(expected, training, num_videos=8192)
    for name, tensor in given.items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
        assert torch.equal(tensor, mean[name]) != name.endswith(STATISTICS), name
        assert torch.equal(tensor, recorded[name]), name
    assert metadata_of(outputs[1]).batch_norm == "recalibrate"


def test_without_statistics_no_records_are_needed(tmp_path):
    paths = [tmp_path / f"step-{step}.safetensors" for step in (2, 4)]
    recipe = tiny_recipe(pooling="average", gating=None)
    models = [
        write_checkpoint(path, recipe, SCHEMA, seed=seed, step=2 * seed + 2)
        for seed, path in enumerate(paths)
    ]

    average_checkpoints(paths, tmp_path / "averaged.safetensors")

    bias = contents_of(tmp_path / "averaged.safetensors")["head.experts.weight"]
    torch.testing.assert_close(bias, sum(m.head.experts.weight.detach() for m in models) / 2)


def test_one_checkpoint_averages_to_itself_however_often_it_is_named(checkpoints, tmp_path):
    output = tmp_path / "averaged.safetensors"

    outcome = average_checkpoints(checkpoints[:1] * 3, output, batch_norm="average")

    assert outcome.used == (checkpoints[0],)
    assert outcome.description == "the mean of 1 checkpoint"

    for name, tensor in contents_of(tmp_path / "averaged.safetensors").items():
        assert torch.equal(tensor, contents_of(checkpoints[0])[name])


def test_checkpoints_of_other_architectures_are_refused(checkpoints, tmp_path):
    other = tmp_path / "other.safetensors"
    write_checkpoint(other, tiny_recipe(overrides=["hidden.size=7"]), SCHEMA, step=9)

    assert message_of([*checkpoints, other], tmp_path / "averaged.safetensors") == (
        f"{other} and {checkpoints[0]} hold different tensors (gating.batch_norm.running_mean, "
        "...).\nAverage checkpoints of one run only: same recipe, same architecture."
    )


def test_checkpoints_of_other_runs_are_refused(checkpoints, tmp_path):
    rewrite_checkpoint(checkpoints[1], run="another")

    assert message_of(checkpoints, tmp_path / "averaged.safetensors") == (
        f"{checkpoints[1]} and {checkpoints[0]} belong to different runs.\n"
        "Average checkpoints of one run only: same recipe, seed and records."
    )


def test_an_average_is_not_averaged_again(checkpoints, tmp_path):
    averaged = tmp_path / "averaged.safetensors"
    average_checkpoints(checkpoints, averaged, batch_norm="last")

    assert message_of([*checkpoints, averaged], tmp_path / "again.safetensors") == (
        f"{averaged} is already an average.\nName the checkpoints of its steps instead."
    )


@pytest.mark.parametrize("batch_norm", ["recalibrate", "average", "last"])
def test_a_checkpoint_of_a_diverged_run_is_named(batch_norm, training, tmp_path):
    paths = [tmp_path / f"step-{step}.safetensors" for step in (2, 4)]
    for path in paths:
        write_checkpoint(path, tiny_recipe(), training.schema)
    tensors = contents_of(paths[1])
    tensors["hidden.bias"][0] = torch.nan
    rewrite_checkpoint(paths[1], tensors, step=4)

    assert message_of(
        paths, tmp_path / "averaged.safetensors", batch_norm=batch_norm, training=training
    ) == (
        f"{paths[1]}: tensor hidden.bias holds NaN or infinity.\n"
        "Use a checkpoint from before the run diverged."
    )
    assert sorted(os.listdir(tmp_path)) == ["step-2.safetensors", "step-4.safetensors"]


def test_training_records_that_are_gone_are_named(tmp_path):
    folder = tmp_path / "records"
    training, _ = tiny_records(folder)
    path = tmp_path / "step-2.safetensors"
    write_checkpoint(path, tiny_recipe(), training.schema, training_files=training.patterns)
    shutil.rmtree(folder)

    assert message_of([path], tmp_path / "averaged.safetensors") == (
        f"{path} was trained on records that are gone: {folder}/train does not exist.\n"
        "Name training records with --data, or use --batch-norm last."
    )


def test_records_that_do_not_fit_are_refused_before_anything_is_written(training, tmp_path):
    path = tmp_path / "step-2.safetensors"
    write_checkpoint(path, tiny_recipe(), SCHEMA)

    with pytest.raises(PredictionsError) as caught:
        average_checkpoints([path], tmp_path / "averaged.safetensors", training=training)

    assert caught.value.problem == (
        f"{path} has rgb (5 float32), audio (3 float32), but these records have rgb (8 uint8), "
        "audio (4 uint8)."
    )
    assert os.listdir(tmp_path) == ["step-2.safetensors"]


def test_an_existing_output_is_kept_without_force(checkpoints, tmp_path):
    output = tmp_path / "averaged.safetensors"
    output.write_bytes(b"old")

    with pytest.raises(OutputError) as caught:
        average_checkpoints(checkpoints, output, batch_norm="last")
    assert str(caught.value) == (
        f"{output} exists already.\nName another output, or replace it with --force."
    )
    assert output.read_bytes() == b"old"

    average_checkpoints(checkpoints, output, batch_norm="last", force=True)
    assert metadata_of(output).averaged_from


def test_a_file_that_is_no_checkpoint_is_refused(checkpoints, tmp_path):
    state = TrainingStateMetadata(
        kit_version="1", name="gru", settings={}, is_finished=True, step=1, batches=0, examples=0,
        seconds=0.0, measured=(),
    )  # fmt: skip
    save_tensors(checkpoints[1], {}, state, force=True)

    assert message_of(checkpoints, tmp_path / "averaged.safetensors") == (
        f"{checkpoints[1]} is a training state file, not a checkpoint file.\n"
        "Name a checkpoint file instead."
    )


def test_no_checkpoint_at_all_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="there are no checkpoints to average"):
        average_checkpoints([], tmp_path / "averaged.safetensors")


def test_a_checkpoint_that_goes_away_meanwhile_is_named(checkpoints, tmp_path, monkeypatch):
    whole = averages.sha256_of

    def removed(path):
        path.unlink()
        return whole(path)

    monkeypatch.setattr(averages, "sha256_of", removed)

    assert message_of(checkpoints, tmp_path / "averaged.safetensors", batch_norm="last") == (
        f"{checkpoints[0]} cannot be read: No such file or directory.\n"
        "Average again, from the checkpoints that are left."
    )
    assert all(name.startswith("step-") for name in os.listdir(tmp_path))
