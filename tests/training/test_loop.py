import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from builders import (
    POOLINGS,
    contents_of,
    interrupt_after,
    lines_of,
    metadata_of,
    tiny_recipe,
    tiny_records,
    tiny_schema,
    train_tiny,
)
from torch import nn

from ensemble_kit.averaging.stage import average_checkpoints
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import (
    OutputError,
    PredictionsError,
    ProviderError,
    RecipeError,
    TrainingError,
)
from ensemble_kit.inference import predict
from ensemble_kit.layers.frame_preparation import prepare_frames
from ensemble_kit.networks.loading import load
from ensemble_kit.networks.running import to_torch
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.store.provenance import CheckpointMetadata
from ensemble_kit.store.run_log import read_metrics
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.training import gradients, loop, optimisation, stage
from ensemble_kit.training.loss import cross_entropy


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "tiny"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_loss_falls_and_the_validation_gap_rises(pooling, folder, records):
    recipe = tiny_recipe(
        pooling=pooling, max_steps=50, checkpoint_every=50, probability_gating=True
    )

    trained = train_tiny(folder, records, recipe, is_validated=True)

    first, last, validated, _ = lines_of(trained)
    assert (first["step"], last["step"], trained.steps) == (1, 50, 50)
    assert last["loss"] < 0.8 * first["loss"]
    assert validated["validation"]["gap"] == trained.best_gap > 0.5


def test_a_fusions_penalty_is_in_the_loss(folder, records):
    rgb, audio = {}, {}  # the mappings' sizes by penalty
    for penalty in (0, 10):
        table = f"fusion={{name='projection', size=3, penalty={penalty}.0}}"
        recipe = tiny_recipe(pooling="average", max_steps=40, overrides=[table])
        trained = train_tiny(folder.parent / f"penalty-{penalty}", records, recipe)
        tensors = contents_of(trained.folder.checkpoints / "step-00000040.safetensors")
        rgb[penalty] = tensors["fusion.weights.0"].norm()
        audio[penalty] = tensors["fusion.weights.1"].norm()

    # what rgb and audio are mapped to cannot differ if it is nothing
    assert rgb[10] < 0.5 * rgb[0]
    assert audio[10] < 0.5 * audio[0]


def test_optimisation_is_the_papers_adam_clip_and_penalty(folder, records):
    recipe = tiny_recipe(
        pooling="average",
        gating=None,
        max_steps=5,
        clip_norm=0.2,
        l2_penalty=0.3,
        examples_per_decay=32,
    )
    train_tiny(folder, records, recipe, seed=3)

    torch.manual_seed(3)
    model = SubModel(recipe, records[0].schema)
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step, batch in enumerate(records[0].training_batches(16, seed=3), start=1):
        if step > 5:
            break
        labels = torch.from_numpy(batch.labels.dense(5)).float()
        probabilities = model(*to_torch(batch, "cpu"))
        loss = -(labels * (probabilities + 1e-5).log()).sum() / 16
        loss -= ((1 - labels) * (1 - probabilities + 1e-5).log()).sum() / 16
        loss += 0.3 * 0.5 * (model.head.gates.weight**2).sum()
        loss += 0.3 * 0.5 * (model.head.experts.weight**2).sum()
        model.zero_grad()
        loss.backward()
        rate = 0.01 * 0.9 ** ((step - 1) * 16 // 32)
        for name, parameter in parameters.items():
            gradient = parameter.grad * min(1.0, 0.2 / parameter.grad.norm().item())
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            parameter.data -= rate * mean / (square.sqrt() + 1e-8)

    trained = contents_of(folder / "checkpoints" / "step-00000005.safetensors")
    assert trained.keys() == parameters.keys()
    for name, parameter in parameters.items():
        # five float32 steps of up to 0.01 each, in another order of operations
        torch.testing.assert_close(trained[name], parameter.data, rtol=1e-4, atol=1e-5)


def test_batch_norm_follows_every_batch_validated_between_or_not(folder, records):
    recipe = tiny_recipe(sampling="all", max_steps=5)  # the input's norm sees no weight before it

    trained = train_tiny(folder, records, recipe, is_validated=True)

    norm = nn.BatchNorm1d(12, eps=1e-3, momentum=0.1)
    for batch, _ in zip(records[0].training_batches(16, seed=0), range(5), strict=False):
        prepared = prepare_frames(*to_torch(batch, "cpu"))
        norm(prepared.normalised[prepared.is_frame])
    stored = contents_of(trained.folder.checkpoint(5))
    torch.testing.assert_close(stored["input_batch_norm.running_mean"], norm.running_mean)
    torch.testing.assert_close(stored["input_batch_norm.running_variance"], norm.running_var)


@pytest.mark.parametrize("head", ["logistic", "mixture_of_experts"])
def test_the_penalty_pulls_at_the_heads_kernels_and_at_nothing_else(
    head, folder, records, monkeypatch
):
    gradients = []
    monkeypatch.setattr(
        optimisation,
        "clip_each",
        lambda tensors, _: gradients.append([tensor.clone() for tensor in tensors]),
    )

    for penalty in (0.0, 0.5):
        recipe = tiny_recipe(head=head, max_steps=1, l2_penalty=penalty, probability_gating=True)
        train_tiny(folder, records, recipe, force=True)

    torch.manual_seed(0)
    model = SubModel(recipe, records[0].schema)
    kernels = {"head.classes.weight", "head.gates.weight", "head.experts.weight"}
    without, with_penalty = gradients
    for (name, parameter), one, other in zip(
        model.named_parameters(), without, with_penalty, strict=True
    ):
        expected = 0.5 * parameter if name in kernels else torch.zeros_like(parameter)
        torch.testing.assert_close(other - one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", ["random", "all"])
def test_processes_that_read_ahead_change_no_weight(sampling, tmp_path, records):
    recipe = tiny_recipe(sampling=sampling, max_steps=8)  # into the second epoch

    alone, helped = (
        train_tiny(tmp_path / str(workers) / "tiny", records, recipe, workers=workers).folder
        for workers in (0, 2)
    )

    assert alone.checkpoint(8).read_bytes() == helped.checkpoint(8).read_bytes()


def test_frames_are_drawn_while_records_are_read(folder, records, monkeypatch):
    seen = []
    whole = Records.training_batches

    def training_batches(self, *arguments, **options):
        for batch in whole(self, *arguments, **options):
            seen.append(batch.frame_weights)
            yield batch

    monkeypatch.setattr(Records, "training_batches", training_batches)

    train_tiny(folder, records, tiny_recipe(sampling="random", max_steps=2))
    train_tiny(folder, records, tiny_recipe(sampling="all", max_steps=1), force=True)

    assert [weights.sum(axis=1).tolist() for weights in seen[:2]] == [[8] * 16] * 2
    assert seen[2:] == [None]


def test_a_batch_whose_records_are_all_bad_is_no_step(tmp_path, folder, records):
    content = bytearray(records[0].paths[0].read_bytes())
    content[-6] ^= 0x40  # the last record's payload
    (tmp_path / "bad.tfrecord").write_bytes(content)
    lenient = Records([tmp_path / "bad.tfrecord"], skip_bad_records=True)
    recipe = tiny_recipe(pooling="average", sampling="all", batch_size=1, max_steps=60)

    trained = train_tiny(folder, (lenient, None), recipe)

    assert lenient.num_skipped == 1
    assert lines_of(trained)[-1]["examples"] == trained.steps == 60


@pytest.mark.parametrize("pooling", ["netvlad", "gru"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(pooling, tmp_path, records):
    runs = [
        train_tiny(tmp_path / place / "tiny", records, tiny_recipe(pooling=pooling), seed=seed)
        for place, seed in (("one", 1), ("two", 1), ("three", 2))
    ]

    for step in (4, 6):
        paths = [trained.folder.checkpoint(step) for trained in runs]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        one, other = contents_of(paths[0]), contents_of(paths[2])
        assert not any(torch.equal(one[name], other[name]) for name in one if "bias" not in name)


def test_checkpoints_are_written_at_steps_and_at_the_end(folder, records):
    trained = train_tiny(folder, records, tiny_recipe(max_steps=5), keep=3)

    assert [path.name for path in trained.folder.checkpoint_paths()] == [
        "step-00000002.safetensors",
        "step-00000004.safetensors",
        "step-00000005.safetensors",
    ]
    assert (trained.steps, trained.is_stopped, trained.best_gap) == (5, False, None)


def test_a_checkpoint_says_what_it_was_trained_on_and_how(folder, records):
    recipe = tiny_recipe(overrides=["training.max_steps=2"])

    trained = train_tiny(folder, records, recipe, seed=7)

    with open_tensors(trained.folder.checkpoint(2)) as file:
        metadata = file.metadata_as(CheckpointMetadata)
    assert metadata.name == "tiny"
    assert metadata.recipe == recipe.metadata
    assert metadata.data_schema == records[0].schema
    assert (metadata.step, metadata.examples, metadata.seed) == (2, 32, 7)
    assert metadata.training_files == records[0].patterns
    assert metadata.averaged_from == ()


@pytest.mark.parametrize("change", ["seed", "recipe", "records"])
def test_runs_that_differ_have_different_identities(change, tmp_path, records):
    others = records
    if change == "records":
        others = tiny_records(tmp_path / "records", num_videos=80)
    recipe = tiny_recipe(max_steps=3 if change == "recipe" else 2)

    one = train_tiny(tmp_path / "one", records, tiny_recipe(max_steps=2))
    other = train_tiny(tmp_path / "other", others, recipe, seed=change == "seed")

    identities = set()
    for trained in (one, other):
        with open_tensors(trained.folder.checkpoint(2)) as file:
            identities.add(file.metadata_as(CheckpointMetadata).run)
    assert len(identities) == 2


def test_every_line_of_the_log_says_where_the_run_was(folder, records, monkeypatch):
    monkeypatch.setattr(stage, "Trainer", partial(loop.Trainer, log_every=4))
    recipe = tiny_recipe(max_steps=8, checkpoint_every=4, examples_per_decay=64)

    trained = train_tiny(folder, records, recipe, is_validated=True)

    lines = lines_of(trained)
    assert [(line["step"], line["examples"], line["epoch"]) for line in lines] == [
        (1, 16, 0),
        (4, 64, 0),
        (4, 64, 0),
        (8, 128, 1),  # an epoch has six batches
        (8, 128, 1),
        (8, 128, 1),
    ]
    assert [line["learning_rate"] for line in lines if "loss" in line] == [0.01, 0.01, 0.01 * 0.9]
    assert all(line["examples_per_second"] > 0 for line in lines if "loss" in line)
    assert all(0 < line["data_wait"] < 1 for line in lines if "loss" in line)
    assert all(line["loss"] > 0 for line in lines if "loss" in line)
    assert lines[-1]["state"] == "finished"
    assert lines[-1]["seconds"] > 0


def test_tensorboard_has_the_log_too_and_a_run_that_is_replaced_takes_it_along(folder, records):
    recipe = tiny_recipe(max_steps=2)
    trained = train_tiny(folder, records, recipe, trackers=["tensorboard"])
    assert list(trained.folder.tensorboard.glob("events.out.tfevents.*"))

    train_tiny(folder, records, recipe, force=True)

    assert not trained.folder.tensorboard.exists()


def test_validation_measures_the_checkpoint_that_was_just_written(folder, records):
    trained = train_tiny(folder, records, tiny_recipe(max_steps=4), is_validated=True)

    validated = [line for line in lines_of(trained) if "validation" in line]
    assert [line["step"] for line in validated] == [2, 4]
    for line in validated:
        metrics = load(trained.folder.checkpoint(line["step"])).measure(records[1])
        assert line["validation"] == metrics.as_dict()
    assert trained.best_gap == max(line["validation"]["gap"] for line in validated)


def test_an_interrupt_leaves_a_checkpoint_that_averages_and_predicts(
    folder, records, monkeypatch, tmp_path
):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        trained = train_tiny(folder, records, tiny_recipe(max_steps=50))

    assert (trained.steps, trained.is_stopped) == (3, True)
    paths = trained.folder.checkpoint_paths()
    assert [path.name for path in paths] == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    assert lines_of(trained)[-1]["state"] == "stopped"
    average_checkpoints(paths, trained.folder.averaged)
    predict(trained.folder.averaged, records[1], tmp_path / "predictions.safetensors")


def test_an_interrupt_right_after_a_checkpoint_writes_no_second(folder, records, monkeypatch):
    interrupt_after(monkeypatch, 2)

    trained = train_tiny(folder, records)

    assert [path.name for path in trained.folder.checkpoint_paths()] == [
        "step-00000002.safetensors"
    ]


def test_an_interrupt_before_the_first_step_leaves_no_checkpoint(folder, records, monkeypatch):
    interrupt_after(monkeypatch, 0)

    trained = train_tiny(folder, records)

    assert (trained.steps, trained.is_stopped) == (0, True)
    assert not trained.folder.checkpoints.exists()


def test_a_run_without_a_state_is_kept_without_force(folder, records):
    trained = train_tiny(folder, records)
    trained.folder.state.unlink()

    with pytest.raises(OutputError) as caught:
        train_tiny(folder, records)

    assert str(caught.value) == (
        f"{folder} holds a run already (checkpoints).\n"
        "Give this run another --name, or replace the old one with --force."
    )


def test_force_replaces_all_of_the_old_run(folder, records):
    train_tiny(folder, records, tiny_recipe(max_steps=6))
    (folder / "averaged.safetensors").touch()
    (folder / "validation.safetensors").touch()
    (folder / "notes.txt").touch()

    train_tiny(folder, records, tiny_recipe(max_steps=3), force=True)

    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "metrics.jsonl",
        "notes.txt",
        "state.safetensors",
    ]


def test_a_recipe_that_does_not_fit_leaves_the_old_run(folder, records):
    train_tiny(folder, records, tiny_recipe(max_steps=2))

    with pytest.raises(RecipeError):
        train_tiny(
            folder, records, tiny_recipe(overrides=["pooling.num_clusters={rgb=3}"]), force=True
        )

    assert (folder / "checkpoints" / "step-00000002.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(folder, records, monkeypatch):
    calls = []

    def diverge(probabilities, labels):
        calls.append(1)
        loss = cross_entropy(probabilities, labels)
        return loss * torch.nan if len(calls) == 4 else loss

    monkeypatch.setattr(gradients, "cross_entropy", diverge)
    *_, fourth = (
        batch for batch, _ in zip(records[0].training_batches(16, seed=0), range(4), strict=False)
    )

    with pytest.raises(TrainingError) as caught:
        train_tiny(folder, records)

    assert str(caught.value) == (
        f"{folder}: the loss is nan at step 4 (videos {', '.join(fourth.ids[:3])}, ...). "
        f"Its last good checkpoint: {folder}/checkpoints/step-00000002.safetensors.\n"
        "Train it under another --name with --set training.learning_rate=LOWER."
    )
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {
        "step": 3, "examples": 48, "epoch": 0,
        "state": "failed", "loss": "nan", "videos": list(fourth.ids),
    }  # fmt: skip
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [
        "step-00000002.safetensors"
    ]


def test_weights_that_are_not_finite_become_no_checkpoint(folder, records, monkeypatch):
    def overflow(gradients, _):
        gradients[0].fill_(torch.inf)  # Adam turns it into NaN, and no later loss may tell

    monkeypatch.setattr(optimisation, "clip_each", overflow)
    recipe = tiny_recipe(max_steps=1, pooling="average", gating=None)

    with pytest.raises(TrainingError) as caught:
        train_tiny(folder, records, recipe)

    assert str(caught.value) == (
        f"{folder}: head.gates.weight is no longer finite at step 1. "
        "Its last good checkpoint: none.\n"
        "Train it under another --name with --set training.learning_rate=LOWER."
    )
    assert not (folder / "checkpoints").exists()
    assert read_metrics(folder / "metrics.jsonl")[-1]["state"] == "failed"


@pytest.mark.parametrize("name", ["-tiny", "ti ny", "ti.ny", "tïny"])
def test_a_name_that_could_not_name_a_node_of_a_graph_is_refused(name, tmp_path, records):
    with pytest.raises(TrainingError) as caught:
        train_tiny(tmp_path / name, records)

    assert str(caught.value) == (
        f"{name!r} cannot name a run.\n"
        "Use at most 200 letters, digits, _ and -, and do not begin with -."
    )
    assert not (tmp_path / name).exists()


def test_validation_records_of_another_kind_are_refused(folder, records):
    training, validation = records
    validation = Records(
        validation.patterns, schema=tiny_schema(widths={"rgb": 8, "audio": 4}, value_type="uint8")
    )

    with pytest.raises(PredictionsError) as caught:
        train_tiny(folder, (training, validation), is_validated=True)

    assert str(caught.value) == (
        f"{training.paths[0].parent} has 5 classes, but these records have 4.\n"
        "Use records of the same vocabulary, or give their schema with --schema."
    )
    assert not folder.exists()


def test_a_device_that_is_not_there_is_refused(folder, records, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ProviderError) as caught:
        train_tiny(folder, records, device="cuda")

    assert caught.value.problem == "PyTorch finds no CUDA device."
    assert not folder.exists()


def gaps_in_turn(monkeypatch, *gaps):
    """Let validation find these GAPs, one after the other."""
    whole, waiting = loop.measure_together, list(gaps)
    monkeypatch.setattr(
        loop,
        "measure_together",
        lambda *arguments, **options: replace(whole(*arguments, **options), gap=waiting.pop(0)),
    )


def test_a_run_without_a_better_gap_stops_when_patience_is_over(folder, records, monkeypatch):
    gaps_in_turn(monkeypatch, 0.2, 0.4, 0.3, 0.4, 0.9)
    recipe = tiny_recipe(max_steps=50)

    trained = train_tiny(folder, records, recipe, is_validated=True, patience=2)

    assert (trained.steps, trained.is_stopped, trained.best_gap) == (8, False, 0.4)
    assert lines_of(trained)[-1]["state"] == "finished"
    assert train_tiny(folder, records, recipe, is_validated=True, patience=2).was_finished


def test_patience_without_validation_records_is_refused(folder, records):
    with pytest.raises(TrainingError) as caught:
        train_tiny(folder, records, patience=2)

    assert str(caught.value) == (
        "--patience waits for a better GAP@20, which needs validation records.\n"
        "Name them with --validation, or leave --patience out."
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("gaps", "keep", "kept"),
    [
        ((0.5, 0.7, 0.7, 0.6, 0.1), 1, [4, 8, 10]),  # average_last is 2; of equals the earlier
        ((0.1, 0.2, 0.3, 0.4, 0.5), None, [8, 10]),
        ((0.9, 0.2, 0.3, 0.4, 0.5), 3, [2, 6, 8, 10]),
    ],
)
def test_the_best_and_the_last_checkpoints_are_kept(gaps, keep, kept, folder, records, monkeypatch):
    gaps_in_turn(monkeypatch, *gaps)

    trained = train_tiny(folder, records, tiny_recipe(max_steps=10), is_validated=True, keep=keep)

    steps = [int(path.stem.removeprefix("step-")) for path in trained.folder.checkpoint_paths()]
    assert steps == kept


def test_a_moving_average_is_kept_beside_the_checkpoints(folder, records):
    recipe = tiny_recipe(max_steps=3, checkpoint_every=1)

    trained = train_tiny(folder, records, recipe, ema=0.9, keep=3)

    steps = [contents_of(trained.folder.checkpoint(step)) for step in (1, 2, 3)]
    torch.manual_seed(0)
    expected = SubModel(recipe, records[0].schema).state_dict()
    for step, weights in enumerate(steps, start=1):
        decay = (1 + step) / (10 + step)
        expected = {
            name: decay * tensor + (1 - decay) * weights[name] for name, tensor in expected.items()
        }
    found = contents_of(trained.folder.ema)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    metadata = metadata_of(trained.folder.ema)
    assert (metadata.step, metadata.ema_decay) == (3, 0.9)
    assert metadata.run == metadata_of(trained.folder.checkpoint(3)).run


def test_training_leaves_the_callers_random_numbers_alone(folder, records):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    train_tiny(folder, records, tiny_recipe())

    assert torch.equal(torch.rand(3), expected)
