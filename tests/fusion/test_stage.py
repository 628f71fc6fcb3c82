import shutil
from functools import partial

import numpy as np
import pytest
import torch
from builders import interrupt_the_writing, tiny_recipe, tiny_schema, write_checkpoint
from workspace_fixture import COEFFICIENTS, MEMBERS, write_selection_of

from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import (
    CheckpointError,
    FusionError,
    OutputError,
    PredictionsError,
    SelectionError,
    SizeLimitError,
)
from ensemble_kit.files import sha256_of
from ensemble_kit.fusion import proof
from ensemble_kit.fusion import stage as fusion
from ensemble_kit.fusion.gap_loss import Forms, Loss, loss_on
from ensemble_kit.fusion.stage import fuse
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.networks.loading import (
    load,
    load_fused,
    load_fused_member,
    load_member,
    member_prefix,
)
from ensemble_kit.networks.products import output_axes
from ensemble_kit.networks.storage import round_to
from ensemble_kit.store.blocks import SCALE
from ensemble_kit.store.dtypes import DTYPES
from ensemble_kit.store.provenance import CheckpointMetadata, FileMetadata, FusedMetadata
from ensemble_kit.store.selection_file import read_selection, write_selection
from ensemble_kit.store.tensor_files import TensorFile, open_tensors, save_tensors

REPORT_IT = "Report this as a bug in ensemble-kit; nothing was written."


@pytest.fixture
def members(tmp_path):
    """Checkpoints of a sampling and a recurrent member, not trained."""
    schema = tiny_schema()
    paths = {name: tmp_path / "runs" / f"{name}.safetensors" for name in ("vlad", "rnn")}
    write_checkpoint(paths["vlad"], tiny_recipe(pooling="netvlad"), schema, seed=1, name="vlad")
    write_checkpoint(paths["rnn"], tiny_recipe(pooling="gru"), schema, seed=2, name="rnn")
    return paths


def select(tmp_path, checkpoints, **options):
    share = 1 / len(checkpoints)
    return write_selection_of(
        tmp_path / "selection.json", checkpoints, dict.fromkeys(checkpoints, share), **options
    )


def refused(kind, selection, output, **options):
    """Fuse, which must fail and leave nothing; return the message."""
    with pytest.raises(kind) as caught:
        fuse(selection, output, **options)
    assert not output.exists()
    assert not list(output.parent.glob(".*"))
    return str(caught.value)


def stored_of(name, dtype, workspace):
    """Return what of a member a fused file should hold, and the member with its weights rounded."""
    with open_tensors(workspace.averaged(name)) as file:
        tensors, model = dict(file.tensors()), load_member(file)
    axes = output_axes(model)
    stored = {key: round_to(t, dtype, output_axis=axes.get(key)) for key, t in tensors.items()}
    model.load_state_dict({key: one.restored() for key, one in stored.items()})
    expected = {
        member_prefix(name) + key + suffix: tensor
        for key, one in stored.items()
        for suffix, tensor in one.tensors().items()
    }
    return expected, model


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_holds_the_members_tensors_rounded_and_nothing_else(dtype, fused, workspace):
    with open_tensors(fused[dtype].path) as file:
        found = dict(file.tensors())

    expected = {}
    for name in MEMBERS:
        expected |= stored_of(name, dtype, workspace)[0]
    assert len(expected) > 40
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("dtype", "packed", "share"), [("int8", "I8", 0.55), ("int4", "U8", 0.4)])
def test_blocks_make_the_file_small_and_take_the_large_matrices_only(dtype, packed, share, fused):
    with open_tensors(fused[dtype].path) as file:
        types = {name: spec.dtype for name, spec in file.specs.items()}

    whole = {name for name, kind in types.items() if kind == packed}
    assert whole == {
        f"member_vlad.{name}" for name in ("gating.weight", "hidden.weight", "head.experts.weight",
                                           "head.gates.weight")
    }  # fmt: skip
    assert {name for name, kind in types.items() if kind == "F16"} == {n + SCALE for n in whole}
    assert fused[dtype].num_bytes < share * fused["bf16"].num_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ensemble_is_the_members_run_one_by_one_and_mixed(dtype, fused, workspace):
    with open_tensors(fused[dtype].path) as file:
        ensemble = load_fused(file, repeats=2)
    frames, num_frames = example_frames(ensemble.schema, 5, 9)

    mixed = torch.zeros(5, 6)
    for name, coefficient in COEFFICIENTS.items():
        model = stored_of(name, dtype, workspace)[1]
        draws = None
        if MEMBERS[name] in {"soft_bof", "netvlad"}:
            draws = draw_table(name, repeats=2, num_frames=8)
        mixed += coefficient * model(frames, num_frames, draws)

    torch.testing.assert_close(ensemble(frames, num_frames), mixed)


def test_the_result_says_what_was_written_and_what_rounding_changed(fused):
    for dtype, file in fused.items():
        assert file.path.stat().st_size == file.num_bytes
        assert (file.members, file.max_size) == (tuple(MEMBERS), 2**30), dtype
        assert 0 <= file.loss.mean_change <= file.loss.worst_change
        assert (file.loss.gap_before, file.coarse) == (None, ())
    changes = [fused[dtype].loss.worst_change for dtype in DTYPES]
    assert changes[:3] == sorted(changes[:3])  # int8 may be finer than bf16 or coarser
    assert changes[0] == 0 < changes[1]
    assert max(changes[:4]) < 0.01
    assert changes[4] < 0.05


def test_the_record_tells_where_everything_came_from(fused, selection, workspace):
    with open_tensors(fused["bf16"].path) as file:
        metadata = file.metadata_as(FusedMetadata)
        num_values = dict.fromkeys(MEMBERS, 0)
        for name, spec in file.specs.items():
            num_values[name.split(".")[0].removeprefix("member_")] += spec.num_values

    assert {member.dtype for member in metadata.members} == {"bf16"}
    assert metadata.top_k == 20
    assert metadata.validation.model_dump() == {
        "metric": "gap", "score": 0.75, "k": 20, "videos": 1,
        "dataset_sha256": "0" * 64, "repeats": 1, "is_refit": False,
    }  # fmt: skip
    assert metadata.kit_version == "0.1.0"
    assert (metadata.selection.path, metadata.selection.sha256) == (
        "selection.json",
        sha256_of(selection),
    )
    assert [member.name for member in metadata.members] == list(MEMBERS)
    for member in metadata.members:
        path = workspace.averaged(member.name)
        with open_tensors(path) as file:
            checkpoint = file.metadata_as(CheckpointMetadata)
        assert member.coefficient == COEFFICIENTS[member.name]
        assert member.recipe == checkpoint.recipe
        assert member.checkpoint.path == f"../runs/{member.name}/averaged.safetensors"
        assert member.checkpoint.sha256 == sha256_of(path)
        assert member.num_values == num_values[member.name]
        assert metadata.data_schema == checkpoint.data_schema
    assert metadata.data_schema.label_names[0] == "steady 0"


def test_fusing_twice_gives_the_same_bytes(selection, fused, tmp_path):
    path = fused["bf16"].path
    before = path.read_bytes()

    again = fuse(selection, path, force=True)

    assert again == fused["bf16"]
    assert path.read_bytes() == before


def test_a_sampling_and_a_recurrent_member_fuse(members, tmp_path):
    output = tmp_path / "fused.safetensors"

    fused = fuse(select(tmp_path, members), output, dtype="fp32")

    assert fused.loss.worst_change == 0
    with open_tensors(output) as file:
        ensemble = load_fused(file, repeats=4)
    assert (ensemble.draws_vlad.shape, hasattr(ensemble, "draws_rnn")) == ((4, 8), False)


def test_twins_draw_different_frames(members, tmp_path):
    shutil.copy(members["vlad"], tmp_path / "twin.safetensors")
    twins = {"one": members["vlad"], "two": tmp_path / "twin.safetensors"}

    fuse(select(tmp_path, twins), tmp_path / "fused.safetensors", dtype="fp32")

    with open_tensors(tmp_path / "fused.safetensors") as file:
        ensemble = load_fused(file, repeats=1)
        weight = member_prefix("one") + "head.experts.weight"
        assert torch.equal(file.tensor(weight), file.tensor(weight.replace("one", "two")))
    assert not torch.equal(ensemble.draws_one, ensemble.draws_two)


@pytest.mark.parametrize("name", ["train", "float", "items", "a-b", "2018"])
def test_any_name_that_a_run_may_have_may_be_a_members(name, members, tmp_path):
    selection = select(tmp_path, {name: members["vlad"], "rnn": members["rnn"]})

    fused = fuse(selection, tmp_path / "fused.safetensors")

    assert fused.members == (name, "rnn")
    with open_tensors(fused.path) as file:
        ensemble = load_fused(file, repeats=2)
    assert ensemble(*example_frames(ensemble.schema, 3, 5)).shape == (3, 4)


def test_a_file_over_the_limit_is_refused_with_what_would_fit(workspace, fused, tmp_path):
    selection = write_selection_of(
        tmp_path / "selection.json",
        {name: workspace.averaged(name) for name in MEMBERS},
        COEFFICIENTS,
        frontier={("rnn",): 0.6371, ("rnn", "bag"): 0.7449, ("vlad", "rnn"): 0.7451},
    )

    message = refused(SizeLimitError, selection, tmp_path / "out.safetensors", max_size=700 * 2**10)

    total, in_int8 = (fused[dtype].num_bytes for dtype in ("bf16", "int8"))
    chosen = read_selection(selection)
    two = chosen.frontier[1].bytes
    assert message == (
        f"The fused file has {total:,} bytes ({total / 2**10:.1f} KiB), {total - 716_800:,} bytes "
        f"({(total - 716_800) / 2**10:.1f} KiB) over the limit of 700.0 KiB. Without vlad it would "
        "fit and lose the least: GAP@20 0.5000, 0.2500 less. In int8 all would fit, in "
        f"{in_int8 / 2**10:.1f} KiB. Of what selection measured, rnn + bag would fit and score "
        f"best: GAP@20 0.7449 in {two / 2**10:.1f} KiB.\n"
        "Fuse with --dtype int8, select again with --max-size 716800, or raise --max-size here."
    )


def test_the_header_counts_too_and_the_hint_makes_room_for_it(members, tmp_path):
    selection = select(tmp_path, members, frontier={("rnn",): 0.5})
    size = fuse(selection, tmp_path / "a.safetensors").num_bytes

    exact = fuse(selection, tmp_path / "b.safetensors", max_size=size)
    message = refused(SizeLimitError, selection, tmp_path / "c.safetensors", max_size=size - 7)

    assert exact.num_bytes == exact.max_size == size
    alone = read_selection(selection).frontier[0].bytes
    assert message == (
        f"The fused file has {size:,} bytes ({size / 2**10:.1f} KiB), 7 bytes (7 bytes) over the "
        f"limit of {(size - 7) / 2**10:.1f} KiB. Without vlad it would fit and lose the least: "
        "GAP@20 0.5000, 0.2500 less. Of what selection measured, rnn would fit and score best: "
        f"GAP@20 0.5000 in {alone / 2**10:.1f} KiB.\n"
        f"Select again with --max-size {size - 7}, or raise --max-size here."
    )


def test_a_changed_member_is_refused(members, tmp_path):
    selection = select(tmp_path, members)
    members["rnn"].unlink()
    write_checkpoint(members["rnn"], tiny_recipe(pooling="gru"), tiny_schema(), seed=9)

    assert refused(FusionError, selection, tmp_path / "out.safetensors") == (
        f"{members['rnn']} has changed since member rnn was selected.\n"
        "Predict and select again, so that the selection describes what is fused."
    )


def test_what_was_hashed_is_what_is_fused(members, tmp_path, monkeypatch):
    selection = select(tmp_path, members)
    whole = TensorFile.sha256

    def replaced(self):
        digest = whole(self)
        if self.path == members["rnn"]:
            self.path.unlink()
            write_checkpoint(self.path, tiny_recipe(pooling="gru"), tiny_schema(), seed=9)
        return digest

    monkeypatch.setattr(TensorFile, "sha256", replaced)

    assert refused(CheckpointError, selection, tmp_path / "out.safetensors") == (
        f"{members['rnn']} was replaced while it was read.\n"
        "Give the command again when nothing writes that file."
    )


def test_a_member_is_hashed_once(members, tmp_path, monkeypatch):
    selection = select(tmp_path, members)
    whole, hashed = TensorFile.sha256, []
    monkeypatch.setattr(TensorFile, "sha256", lambda self: hashed.append(self.path) or whole(self))

    fuse(selection, tmp_path / "out.safetensors")

    assert sorted(hashed) == sorted(members.values())


def test_a_missing_member_is_refused(members, tmp_path):
    selection = select(tmp_path, members)
    members["rnn"].unlink()

    assert refused(FusionError, selection, tmp_path / "out.safetensors") == (
        f"{selection}: the checkpoint of member rnn, {members['rnn']}, does not exist.\n"
        "Put it back, or predict and select again."
    )


@pytest.mark.parametrize("kind", ["onnx", "fused", None])
def test_a_member_that_is_no_checkpoint_is_refused(kind, members, tmp_path):
    selection = select(tmp_path, members)
    metadata = read_selection(selection)
    first = metadata.members[0]
    model = first.model.model_copy(update={"kind": kind}) if kind else None
    first = first.model_copy(update={"model": model})
    metadata = metadata.model_copy(update={"members": (first, metadata.members[1])})
    write_selection(selection, metadata, force=True)

    assert refused(FusionError, selection, tmp_path / "out.safetensors") == (
        f"{selection}: member vlad is {kind or 'predictions without a model'}; only checkpoints "
        "and foreign models can be fused.\n"
        "Select again without it."
    )


BOTH = "have rgb (5 float32), audio (3 float32)"


@pytest.mark.parametrize(
    ("other", "has", "have"),
    [
        ({"widths": {"rgb": 5, "audio": 4}}, "has rgb (5 float32), audio (4 float32)", BOTH),
        ({"widths": {"rgb": 5}}, "has rgb (5 float32)", BOTH),
        ({"value_type": "uint8"}, "has rgb (5 uint8), audio (3 uint8)", BOTH),
        ({"num_classes": 3}, "has 3 classes", "have 4"),
    ],
)
def test_members_of_different_schemas_are_refused(other, has, have, members, tmp_path):
    stranger = tmp_path / "runs" / "stranger.safetensors"
    write_checkpoint(stranger, tiny_recipe(pooling="average"), tiny_schema(**other))
    selection = select(tmp_path, members | {"stranger": stranger})

    assert refused(FusionError, selection, tmp_path / "out.safetensors") == (
        f"{stranger} {has}, but members before it, such as {members['vlad']}, {have}.\n"
        "Fuse members that were trained on records of one schema."
    )


def change(path, name, function):
    """Change one tensor of a checkpoint in place."""
    with open_tensors(path) as file:
        tensors, metadata = dict(file.tensors()), file.metadata_as(CheckpointMetadata)
    tensors[name] = tensors[name].clone()
    function(tensors[name])
    save_tensors(path, tensors, metadata, force=True)


def test_a_number_too_large_for_fp16_is_named(members, tmp_path):
    change(
        members["rnn"], "head.experts.bias", lambda tensor: tensor[1:2].fill_(-65_520.0)
    )  # 65,519 still rounds to 65,504
    selection = select(tmp_path, members)

    message = refused(FusionError, selection, tmp_path / "out.safetensors", dtype="fp16")

    assert message == (
        f"{members['rnn']}: head.experts.bias holds 65520, too large for fp16.\n"
        "Fuse with --dtype bf16, which has the range of fp32."
    )
    assert fuse(selection, tmp_path / "out.safetensors", dtype="bf16").loss.worst_change < 0.1


def test_numbers_too_near_0_for_fp16_are_named(members, tmp_path):
    change(members["rnn"], "head.gates.weight", lambda tensor: tensor.mul_(1e-6))
    selection = select(tmp_path, members)

    fused = fuse(selection, tmp_path / "out.safetensors", dtype="fp16")

    assert fused.coarse == ("member_rnn.head.gates.weight",)
    assert fuse(selection, fused.path, dtype="bf16", force=True).coarse == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_member_that_has_diverged_is_named_and_not_called_too_large(
    dtype, value, members, tmp_path
):
    change(members["rnn"], "head.experts.bias", lambda tensor: tensor[1:2].fill_(value))
    selection = select(tmp_path, members)

    assert refused(CheckpointError, selection, tmp_path / "out.safetensors", dtype=dtype) == (
        f"{members['rnn']}: tensor head.experts.bias holds NaN or infinity.\n"
        "Use a checkpoint from before the run diverged."
    )


# On records


def test_gap_before_and_after_is_that_of_both_files(selection, fused, workspace, tmp_path):
    records = Records([workspace.path / "data" / "validate"])

    loss = fuse(selection, tmp_path / "f.safetensors", dtype="int8", records=records).loss

    metrics = {dtype: load(fused[dtype].path).measure(records) for dtype in ("fp32", "int8")}
    assert loss.gap_before == pytest.approx(metrics["fp32"].gap, abs=1e-9)
    assert loss.gap_after == pytest.approx(metrics["int8"].gap, abs=1e-9)
    assert loss.num_videos == 20
    (batch,) = records.batches(20)
    exact, rounded = (load(fused[dtype].path).probabilities(batch) for dtype in ("fp32", "int8"))
    change = np.abs(exact - rounded)
    assert loss.worst_change == pytest.approx(change.max(), rel=1e-3)
    assert loss.mean_change == pytest.approx(change.mean(), rel=1e-3)


def test_the_loss_is_the_same_in_blocks_of_any_size(fused, workspace):
    records = Records([workspace.path / "data" / "validate"])
    with open_tensors(fused["fp32"].path) as exact, open_tensors(fused["int8"].path) as rounded:
        metadata = exact.metadata_as(FusedMetadata)
        members = [
            Forms(
                member.name,
                member.coefficient,
                partial(load_fused_member, exact, member, metadata.data_schema),
                partial(load_fused_member, rounded, member, metadata.data_schema),
            )
            for member in metadata.members
        ]
        whole = loss_on(records, members, k=20)

        parts = loss_on(records, members, k=20, batch_size=3, block_bytes=1000)

    assert whole.worst_change > 0
    assert parts == pytest.approx(whole, abs=1e-6)


def test_more_loss_than_was_allowed_is_refused(selection, workspace, tmp_path, monkeypatch):
    records = Records([workspace.path / "data" / "validate"])
    found = Loss(0.25, 0.125, 0.4073, 0.4061, 1234)
    monkeypatch.setattr(fusion, "loss_on", lambda *_, **__: found)
    output = tmp_path / "f.safetensors"

    message = refused(FusionError, selection, output, dtype="int8", records=records)

    assert message == (
        f"{output}: in int8 GAP@20 falls by 0.0012, from 0.4073 to 0.4061 on 1,234 videos; the "
        "limit is 0.001.\n"
        "Fuse with another --dtype, or raise --max-gap-loss."
    )
    assert fuse(selection, output, records=records, max_gap_loss=0.0013).loss == found


def test_records_of_another_kind_are_refused_before_any_work(members, workspace, tmp_path):
    selection = select(tmp_path, members)
    records = Records([workspace.path / "data" / "validate"])

    message = refused(PredictionsError, selection, tmp_path / "f.safetensors", records=records)

    assert message == (
        f"{selection} has rgb (5 float32), audio (3 float32), but these records have rgb "
        "(7 uint8), audio (3 uint8).\nUse records with the same modalities, widths and value types."
    )


def test_an_existing_file_is_refused_before_any_work(members, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_text("mine")
    members["rnn"].unlink()

    with pytest.raises(OutputError) as caught:
        fuse(tmp_path / "no.json", output)

    assert str(caught.value) == (
        f"{output} exists already.\nName another output, or replace it with --force."
    )
    assert output.read_text() == "mine"


@pytest.fixture
def another_member(monkeypatch):
    """Have the proof load another model than the fused file holds."""
    load = proof.load_fused_member

    def load_another(file, member, schema):
        model = load(file, member, schema)
        if member.name == "rnn":
            model.head.experts.bias.data += 0.5
        return model

    monkeypatch.setattr(proof, "load_fused_member", load_another)


@pytest.mark.usefixtures("another_member")
def test_a_file_that_differs_from_its_members_is_not_kept(members, tmp_path):
    message = refused(FusionError, select(tmp_path, members), tmp_path / "out.safetensors")

    problem, hint = message.split("\n")
    start = f"{tmp_path / 'out.safetensors'}: member rnn differs by 0."
    assert problem.startswith(start)
    assert problem.removeprefix(start).lstrip("0123456789") == (
        f" from {members['rnn']} rounded to bf16; the tolerance is 1e-06."
    )
    assert hint == REPORT_IT


@pytest.mark.usefixtures("another_member")
def test_a_failing_proof_leaves_the_old_file(members, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"the old file")

    with pytest.raises(FusionError, match="rnn differs"):
        fuse(select(tmp_path, members), output, force=True)

    assert output.read_bytes() == b"the old file"
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_fuse_leaves_the_old_file(members, tmp_path, monkeypatch):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"the old file")
    interrupt_the_writing(monkeypatch)

    with pytest.raises(KeyboardInterrupt):
        fuse(select(tmp_path, members), output, force=True)

    assert output.read_bytes() == b"the old file"
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_is_no_selection_or_no_checkpoint_is_refused(members, tmp_path):
    missing = tmp_path / "no.json"
    assert refused(SelectionError, missing, tmp_path / "out.safetensors") == (
        f"{missing} cannot be read: No such file or directory.\n"
        "Run `ensemble-kit select` first, or name a selection that exists."
    )

    selection = select(tmp_path, members)
    fuse(selection, tmp_path / "fused.safetensors")
    chosen = read_selection(selection)
    first = chosen.members[0]
    found = FileMetadata.of(tmp_path / "fused.safetensors", tmp_path)
    model = first.model.model_copy(update={"file": found})
    chosen = chosen.model_copy(
        update={"members": (first.model_copy(update={"model": model}), chosen.members[1])}
    )
    write_selection(selection, chosen, force=True)
    assert refused(CheckpointError, selection, tmp_path / "out.safetensors") == (
        f"{tmp_path / 'fused.safetensors'} is a fused file, not a checkpoint file.\n"
        "Name a checkpoint file instead."
    )
