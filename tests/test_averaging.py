import os
import shutil
from itertools import permutations

import numpy as np
import pytest
import torch
from builders import (
    tiny_model,
    tiny_recipe,
    tiny_records,
    tiny_schema,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit import averaging
from ensemble_kit.averaging import average_checkpoints, mean_tensor, recalibrate
from ensemble_kit.checkpoints import open_tensors, save_tensors
from ensemble_kit.errors import CheckpointError, OutputError, PredictionsError
from ensemble_kit.files import sha256_of
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import WhitenedResiduals
from ensemble_kit.provenance import CheckpointRecord

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


def contents(path):
    with open_tensors(path) as file:
        return {name: tensor.clone() for name, tensor in file.tensors()}


def record_of(path):
    with open_tensors(path) as file:
        return file.record(CheckpointRecord)


def rewrite(path, tensors=None, **changes):
    """Write a checkpoint again with other tensors, or other values in its record."""
    record = record_of(path).model_copy(update=changes)
    save_tensors(path, tensors or contents(path), record, force=True)


def message_of(paths, output, **options):
    with pytest.raises(CheckpointError) as caught:
        average_checkpoints(paths, output, **options)
    assert not output.exists()
    return str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 20))
def test_copies_average_to_themselves_exactly(value, copies):
    mean = mean_tensor([torch.tensor([value])] * copies)

    assert mean.item() == value
    assert mean.dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
def test_the_mean_is_that_of_float64_sums(values):
    total = np.float64(0)
    for value in values:
        total += np.float64(value)

    mean = mean_tensor([torch.tensor(value) for value in values])

    assert mean.item() == np.float32(total / len(values))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=6))
def test_counts_take_the_largest_exactly(counts):
    mean = mean_tensor([torch.tensor([count]) for count in counts])

    assert mean.tolist() == [max(counts)]
    assert mean.dtype == torch.int64


def test_every_floating_tensor_is_the_mean_over_the_files(checkpoints, tmp_path):
    output = tmp_path / "averaged.safetensors"

    assert average_checkpoints(checkpoints, output, batch_norm="average") == output

    files, averaged = [contents(path) for path in checkpoints], contents(output)
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

    newest = contents(checkpoints[-1])
    for name, tensor in contents(last).items():
        source = newest if name.endswith(STATISTICS) else contents(mean)
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

    record = record_of(output)
    assert [parent.path for parent in record.averaged_from] == [
        f"../step-{step}.safetensors" for step in (2, 4, 6)
    ]
    assert [parent.sha256 for parent in record.averaged_from] == list(map(sha256_of, checkpoints))
    assert record.batch_norm == "last"
    assert record.step == 6
    assert record.recipe == tiny_recipe().record
    assert record.run == record_of(checkpoints[0]).run


def test_integer_buffers_take_the_largest(checkpoints, tmp_path):
    for count, path in zip((3, 9, 5), checkpoints, strict=True):
        rewrite(path, contents(path) | {"count": torch.tensor([count])})

    average_checkpoints(checkpoints, tmp_path / "averaged.safetensors", batch_norm="average")

    assert contents(tmp_path / "averaged.safetensors")["count"].tolist() == [9]


def test_recalibrated_statistics_are_those_of_one_pass_over_the_records(training, monkeypatch):
    monkeypatch.setattr(averaging, "RECALIBRATION_BATCH", 32)
    model = tiny_model(tiny_recipe(sampling="all", probability_gating=True), training.schema)
    seen = {}  # layer name -> what it was given in each batch, with how often each row counts

    def note(name):
        def hook(_, arguments):
            values, *weights = arguments
            counts = weights[0].flatten() if weights else torch.ones(values.shape[0])
            rows = values.flatten(0, -2).repeat_interleave(counts.long(), dim=0)
            seen.setdefault(name, []).append(rows.double())

        return hook

    layers = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm)}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    recalibrate(model, training, num_videos=64)

    for hook in hooks:
        hook.remove()
    assert len(layers) == 5
    for name, layer in layers.items():
        batches = seen[name]
        assert len(batches) == 2  # 64 videos of the 96
        mean = sum(rows.mean(dim=0) for rows in batches) / 2
        variance = sum(rows.var(dim=0) for rows in batches) / 2
        # float32 sums over some hundred rows
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_variance.double(), variance, rtol=1e-5, atol=1e-5)
        assert layer.momentum == 0.1
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_recalibration_ends_with_the_records(training, monkeypatch):
    monkeypatch.setattr(averaging, "RECALIBRATION_BATCH", 32)
    model = tiny_model(tiny_recipe(sampling="all"), training.schema)
    sizes = []
    model.input_batch_norm.register_forward_pre_hook(
        lambda _, arguments: sizes.append(len(arguments[0]))
    )

    recalibrate(model, training, num_videos=10_000)

    assert sizes == [32, 32, 32]


def test_recalibrating_again_forgets_the_first_time(training, monkeypatch):
    monkeypatch.setattr(averaging, "RECALIBRATION_BATCH", 32)
    model = tiny_model(tiny_recipe(), training.schema)
    recalibrate(model, training, num_videos=96)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name.endswith(STATISTICS):
            tensor += 1

    recalibrate(model, training, num_videos=96)

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_whitening_is_recalibrated_as_batch_norms_are(training, monkeypatch):
    monkeypatch.setattr(averaging, "RECALIBRATION_BATCH", 32)
    model = tiny_model(tiny_recipe(pooling="second_order", sampling="all"), training.schema)
    layers = [part for part in model.modules() if isinstance(part, WhitenedResiduals)]
    seen = {layer: [] for layer in layers}
    for layer in layers:

        def noted(frames, assignment, row_weights, layer=layer, describe=layer.describe):
            seen[layer].append(frames[row_weights > 0].double())
            return describe(frames, assignment, row_weights)

        monkeypatch.setattr(layer, "describe", noted)

    recalibrate(model, training, num_videos=64)

    assert len(layers) == 4
    for layer in layers:
        assert len(seen[layer]) == 2  # 64 videos of the 96
        moments = []
        for rows in seen[layer]:
            differences = rows.unsqueeze(1) - layer.centres  # (frames, K, D)
            if layer.order == 2:
                differences = (differences.unsqueeze(-1) * differences.unsqueeze(-2)).flatten(-2)
            residuals = differences / differences.norm(dim=-1, keepdim=True)
            moments.append((residuals.mean(dim=0), residuals.var(dim=0, correction=0)))
        for statistic, batches in zip(
            (layer.running_mean, layer.running_variance), zip(*moments, strict=True), strict=True
        ):
            # float32 sums over some hundred rows
            mean = sum(batches) / 2
            torch.testing.assert_close(statistic.double(), mean, rtol=1e-5, atol=1e-5)
        assert layer.momentum == 0.1
    assert not model.training


def test_dropout_drops_nothing_while_statistics_are_estimated(training):
    plain = tiny_model(tiny_recipe(), training.schema)
    dropping = tiny_model(tiny_recipe(overrides=["hidden.dropout=0.5"]), training.schema)
    dropping.load_state_dict(plain.state_dict())

    for model in (plain, dropping):
        recalibrate(model, training, num_videos=96)

    for name, tensor in dropping.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


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

    mean, given, recorded = map(contents, outputs)
    expected = tiny_model(tiny_recipe(), training.schema)
    expected.load_state_dict(mean)
    recalibrate(expected, training, num_videos=8192)
    for name, tensor in given.items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
        assert torch.equal(tensor, mean[name]) != name.endswith(STATISTICS), name
        assert torch.equal(tensor, recorded[name]), name
    assert record_of(outputs[1]).batch_norm == "recalibrate"


def test_without_statistics_no_records_are_needed(tmp_path):
    paths = [tmp_path / f"step-{step}.safetensors" for step in (2, 4)]
    recipe = tiny_recipe(pooling="average", gating=None)
    models = [
        write_checkpoint(path, recipe, SCHEMA, seed=seed, step=2 * seed + 2)
        for seed, path in enumerate(paths)
    ]

    average_checkpoints(paths, tmp_path / "averaged.safetensors")

    bias = contents(tmp_path / "averaged.safetensors")["head.experts.weight"]
    torch.testing.assert_close(bias, sum(m.head.experts.weight.detach() for m in models) / 2)


def test_one_checkpoint_averages_to_itself(checkpoints, tmp_path):
    average_checkpoints(checkpoints[:1], tmp_path / "averaged.safetensors", batch_norm="average")

    for name, tensor in contents(tmp_path / "averaged.safetensors").items():
        assert torch.equal(tensor, contents(checkpoints[0])[name])


def test_checkpoints_of_other_architectures_are_refused(checkpoints, tmp_path):
    other = tmp_path / "other.safetensors"
    write_checkpoint(other, tiny_recipe(overrides=["hidden.size=7"]), SCHEMA, step=9)

    assert message_of([*checkpoints, other], tmp_path / "averaged.safetensors") == (
        f"{other} and {checkpoints[0]} hold different tensors (gating.batch_norm.running_mean, "
        "...).\nAverage checkpoints of one run only: same recipe, same architecture."
    )


def test_checkpoints_of_other_runs_are_refused(checkpoints, tmp_path):
    rewrite(checkpoints[1], run="another")

    assert message_of(checkpoints, tmp_path / "averaged.safetensors") == (
        f"{checkpoints[1]} and {checkpoints[0]} are of different runs.\n"
        "Average checkpoints of one run only: same recipe, seed and records."
    )


def test_an_average_is_not_averaged_again(checkpoints, tmp_path):
    averaged = tmp_path / "averaged.safetensors"
    average_checkpoints(checkpoints, averaged, batch_norm="last")

    assert message_of([*checkpoints, averaged], tmp_path / "again.safetensors") == (
        f"{averaged} is an average already.\nName the checkpoints of its steps instead."
    )


@pytest.mark.parametrize("batch_norm", ["recalibrate", "average", "last"])
def test_a_checkpoint_of_a_diverged_run_is_named(batch_norm, training, tmp_path):
    paths = [tmp_path / f"step-{step}.safetensors" for step in (2, 4)]
    for path in paths:
        write_checkpoint(path, tiny_recipe(), training.schema)
    tensors = contents(paths[1])
    tensors["hidden.bias"][0] = torch.nan
    rewrite(paths[1], tensors, step=4)

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

    assert caught.value.fault == (
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
    assert record_of(output).averaged_from


def test_a_file_that_is_no_checkpoint_is_refused(checkpoints, tmp_path):
    rewrite(checkpoints[1], kind="fused")

    assert message_of(checkpoints, tmp_path / "averaged.safetensors") == (
        f"{checkpoints[1]} is a fused file, not a checkpoint file.\nName a checkpoint file instead."
    )
