import numpy as np
import pytest
import torch
from builders import (
    POOLINGS,
    seal,
    tiny_frames,
    tiny_model,
    tiny_recipe,
    tiny_schema,
    write_checkpoint,
)

from ensemble_kit.data.dataset import Batch
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import check_fits
from ensemble_kit.errors import CheckpointError, PredictionsError, ProviderError
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.networks.ensemble import FusedEnsemble
from ensemble_kit.networks.loading import load, load_member, member_prefix
from ensemble_kit.networks.products import output_axes
from ensemble_kit.networks.storage import round_to
from ensemble_kit.store.provenance import (
    CheckpointMetadata,
    FileMetadata,
    FusedMetadata,
    MemberMetadata,
    PredictionsMetadata,
)
from ensemble_kit.store.tensor_files import open_tensors, save_tensors

SCHEMA = tiny_schema(value_type="uint8")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def batch(rng):
    frames, num_frames = tiny_frames(SCHEMA, [7, 4, 1], rng)
    arrays = {name: values.numpy() for name, values in frames.items()}
    return Batch(("a", "b", "c"), arrays, num_frames.numpy(), LabelLists.from_lists([[0], [], [1]]))


def as_torch(batch):
    frames = {name: torch.from_numpy(values) for name, values in batch.frames.items()}
    return frames, torch.from_numpy(batch.num_frames)


def spoil(path, change):
    """Change the tensors of a checkpoint or a fused file, and keep its metadata."""
    with open_tensors(path) as file:
        kind = FusedMetadata if file.kind == "fused" else CheckpointMetadata
        metadata, tensors = file.metadata_as(kind), dict(file.tensors())
    change(tensors)
    save_tensors(path, tensors, metadata, force=True)


def write_fused(path, members, dtype):
    records = tuple(
        MemberMetadata(
            name=name,
            coefficient=coefficient,
            dtype=dtype,
            recipe=model.recipe.metadata,
            checkpoint=FileMetadata(path="x", sha256="0" * 64),
            num_values=sum(tensor.numel() for tensor in model.state_dict().values()),
        )
        for (name, model), coefficient in zip(members.items(), (0.75, 0.25), strict=False)
    )
    metadata = FusedMetadata(
        content_sha256="0" * 64,
        kit_version="0.0",
        members=records,
        data_schema=SCHEMA,
        selection=None,
        validation=None,
        top_k=20,
    )
    tensors = {
        member_prefix(name) + key + suffix: part
        for name, model in members.items()
        for axes in [output_axes(model)]
        for key, tensor in model.state_dict().items()
        for suffix, part in round_to(tensor, dtype, output_axis=axes.get(key)).tensors().items()
    }
    save_tensors(path, tensors, metadata, force=False)
    seal(path)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("repeats", [None, 3])
def test_a_checkpoint_gives_the_probabilities_of_the_sub_model_it_was_written_from(
    pooling, repeats, path, batch
):
    model = write_checkpoint(path, tiny_recipe(pooling=pooling), SCHEMA, name="mine")

    loaded = load(path, repeats=repeats)

    draws = None
    if model.num_draws is not None:
        draws = draw_table("mine", repeats=repeats or 1, num_frames=model.num_draws)
    expected = model(*as_torch(batch), draws).detach().numpy()
    np.testing.assert_array_equal(loaded.probabilities(batch), expected)
    assert (loaded.kind, loaded.name, loaded.path) == ("checkpoint", "mine", path)
    assert loaded.schema == SCHEMA
    assert loaded.repeats == (1 if draws is None else repeats or 1)
    assert loaded.num_values == sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fused_file_gives_the_mixed_probabilities_of_its_rounded_members(dtype, path, batch):
    members = {
        "one": tiny_model(tiny_recipe(pooling="netvlad"), SCHEMA, seed=1),
        "two": tiny_model(tiny_recipe(pooling="gru"), SCHEMA, seed=2),
    }
    write_fused(path, members, dtype)

    loaded = load(path, repeats=3)

    for model in members.values():
        state = {key: round_to(t, dtype).restored() for key, t in model.state_dict().items()}
        model.load_state_dict(state)
    expected = FusedEnsemble(members, (0.75, 0.25), SCHEMA, repeats=3)(*as_torch(batch))
    np.testing.assert_array_equal(loaded.probabilities(batch), expected.detach().numpy())
    assert (loaded.kind, loaded.name, loaded.repeats) == ("fused", "model", 3)
    assert loaded.num_values == sum(
        tensor.numel() for model in members.values() for tensor in model.state_dict().values()
    )


def test_a_fused_file_whose_bytes_have_changed_is_not_run(path):
    write_fused(path, {"one": tiny_model(tiny_recipe(), SCHEMA, seed=1)}, "bf16")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        load(path)

    assert str(caught.value) == (
        f"{path} has changed since it was fused: the SHA-256 of its content is not the one it "
        "names.\nFuse again, or copy the file again from where it is whole."
    )


def test_weights_are_computed_with_in_float32_whatever_they_are_stored_in(path):
    model = write_checkpoint(path, tiny_recipe(), SCHEMA)
    spoil(path, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))

    with open_tensors(path) as file:
        loaded = load_member(file)

    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda tensors: tensors.pop("hidden.bias"),
            "tensor hidden.bias is missing; the model needs shape (6,).\n"
            "Write the file again with this version of ensemble-kit.",
        ),
        (
            lambda tensors: tensors.update({"hidden.bias": torch.ones(2, 3)}),
            "tensor hidden.bias has shape (2, 3); the model needs shape (6,).\n"
            "Write the file again with this version of ensemble-kit.",
        ),
        (
            lambda tensors: tensors["hidden.weight"][0].fill_(torch.inf),
            "tensor hidden.weight holds NaN or infinity.\n"
            "Use a checkpoint from before the run diverged.",
        ),
        (
            lambda tensors: tensors["hidden.weight"][0].fill_(torch.nan),
            "tensor hidden.weight holds NaN or infinity.\n"
            "Use a checkpoint from before the run diverged.",
        ),
    ],
    ids=["missing", "shape", "infinity", "NaN"],
)
def test_a_checkpoint_that_its_recipe_cannot_use_is_refused(path, change, problem):
    write_checkpoint(path, tiny_recipe(), SCHEMA)
    spoil(path, change)

    with pytest.raises(CheckpointError) as caught:
        load(path)

    assert str(caught.value) == f"{path}: {problem}"


def test_predictions_are_no_model(path, batch):
    metadata = PredictionsMetadata(
        kit_version="1", name="gru", model=None, label_names=(), vocabulary_sha256="0" * 64,
        dataset_sha256="0" * 64,
    )  # fmt: skip
    save_tensors(path, {}, metadata, force=True)

    with pytest.raises(CheckpointError) as caught:
        load(path)

    assert str(caught.value) == (
        f"{path} is a predictions file, not a checkpoint file.\nName a checkpoint file instead."
    )


def test_a_missing_onnx_file_is_named(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "ensemble.onnx")

    assert (
        str(caught.value) == f"{tmp_path}/ensemble.onnx does not exist.\nName a file that exists."
    )


def test_the_repeats_of_a_file_that_holds_its_draws_cannot_be_changed(exported):
    with pytest.raises(CheckpointError) as caught:
        load(exported.path, repeats=exported.repeats + 1)

    assert str(caught.value) == (
        f"{exported.path} was exported for {exported.repeats} repeats; --repeats cannot change "
        "that.\nLeave --repeats out, or export the ensemble again with another --repeats."
    )
    assert load(exported.path, repeats=exported.repeats).repeats == exported.repeats


def test_a_device_that_is_not_there_is_refused(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_checkpoint(path, tiny_recipe(), SCHEMA)

    with pytest.raises(ProviderError) as caught:
        load(path, device="cuda")

    assert str(caught.value) == (
        "PyTorch finds no CUDA device.\n"
        "Use --device cpu, or install a driver and a PyTorch built for CUDA."
    )


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            tiny_schema(widths={"rgb": 5}),
            "has rgb (5 float32), audio (3 float32), but these records have rgb (5 float32).\n"
            "Use records with the same modalities, widths and value types.",
        ),
        (
            tiny_schema(widths={"rgb": 5, "audio": 2}),
            "has rgb (5 float32), audio (3 float32), but these records have rgb (5 float32), "
            "audio (2 float32).\nUse records with the same modalities, widths and value types.",
        ),
        (
            tiny_schema(value_type="uint8"),
            "has rgb (5 float32), audio (3 float32), but these records have rgb (5 uint8), "
            "audio (3 uint8).\nUse records with the same modalities, widths and value types.",
        ),
        (
            tiny_schema(num_classes=3),
            "has 4 classes, but these records have 3.\n"
            "Use records of the same vocabulary, or give their schema with --schema.",
        ),
        (
            tiny_schema(label_names=["a", "b", "x", "d"]),
            "calls class 2 'c', but these records call it 'x'.\n"
            "Use records of the same vocabulary, or their own --label-names.",
        ),
    ],
    ids=["modalities", "widths", "value types", "classes", "names"],
)
def test_records_of_another_kind_do_not_fit(records, message, path):
    model = tiny_schema(label_names=["a", "b", "c", "d"])

    with pytest.raises(PredictionsError) as caught:
        check_fits(model, records, path=path)

    assert str(caught.value) == f"{path} {message}"


@pytest.mark.parametrize("names", [None, ("a", "b", "c", "d")])
def test_records_fit_whatever_their_keys_are_called(names, path):
    model = tiny_schema(label_names=["a", "b", "c", "d"])
    records = tiny_schema(label_names=names).model_copy(
        update={"id_key": "video_id", "max_frames": 7, "level": "video"}
    )

    check_fits(model, records, path=path)

    with pytest.raises(PredictionsError):  # the order of names is more than a key
        check_fits(model, records.model_copy(update={"label_names": tuple("dcba")}), path=path)


SCALES = "member_one.hidden.weight.block_scale"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda tensors: tensors[SCALES][0].fill_(torch.nan),
            f"tensor {SCALES} holds a scale that is negative, NaN or infinity.",
        ),
        (
            lambda tensors: tensors[SCALES].neg_(),
            f"tensor {SCALES} holds a scale that is negative, NaN or infinity.",
        ),
        (
            lambda tensors: tensors.update({SCALES: tensors[SCALES][:-1]}),
            f"tensor {SCALES} has shape (2, 80); the model needs shape (3, 80) or (72, 3).",
        ),
        (
            lambda tensors: tensors.update({SCALES: tensors[SCALES].float()}),
            "tensor member_one.hidden.weight is stored as U8 with scales in F32; blocks have I8 "
            "or U8 with F16.",
        ),
        (
            lambda tensors: tensors.update(
                {SCALES[: -len(".block_scale")]: torch.zeros(7, dtype=torch.uint8)}
            ),
            "tensor member_one.hidden.weight has shape (7,); the model needs shape (2880,).",
        ),
        (
            lambda tensors: tensors.pop("member_one.hidden.weight"),
            "tensor member_one.hidden.weight is missing; the model needs shape (72, 80).",
        ),
    ],
    ids=["NaN", "negative", "blocks", "type", "numbers", "no matrix"],
)
def test_a_fused_file_with_damaged_blocks_is_refused(path, change, problem):
    recipe = tiny_recipe(pooling="netvlad", overrides=["hidden.size=80", "pooling.num_clusters=9"])
    write_fused(path, {"one": tiny_model(recipe, SCHEMA, seed=1)}, "int4")
    spoil(path, change)

    with pytest.raises(CheckpointError) as caught:
        load(path)

    assert str(caught.value) == (
        f"{path}: {problem}\nWrite the file again with this version of ensemble-kit."
    )
