import shutil
from pathlib import Path

import onnx
import pytest
import torch
from builders import seal

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import CheckpointError, ExportError, PredictionsError, ProviderError
from ensemble_kit.files import format_size
from ensemble_kit.networks.loading import load
from ensemble_kit.predictions.videos import dataset_sha256
from ensemble_kit.store.provenance import FusedMetadata, ValidationMetadata
from ensemble_kit.store.tensor_files import open_tensors, save_tensors
from ensemble_kit.verification import verify


@pytest.fixture
def onnx_file(exported, fused, tmp_path):
    """A copy of the exported file, its fused file beside it, to spoil."""
    shutil.copy(fused["bf16"].path, tmp_path / "fused.safetensors")
    return Path(shutil.copy(exported.path, tmp_path / "ensemble.onnx"))


@pytest.fixture
def records(workspace):
    return Records([workspace.path / "data" / "validate"])


def found(path, *args, **options):
    """Return verdict and finding of each claim by its name."""
    return {each.name: (each.verdict, each.finding) for each in verify(path, *args, **options)}


def rewritten(path, source, *, change=lambda _: None, **updates):
    """Write a fused file again: tensors changed in place, and keys of its metadata."""
    with open_tensors(source) as file:
        metadata, tensors = file.metadata_as(FusedMetadata), dict(file.tensors())
    change(tensors)
    save_tensors(path, tensors, metadata.model_copy(update=updates), force=True)
    return path


def claim_of(records, gap):
    """Return what a selection on some records would have noted."""
    videos = list(records.videos())
    labels = LabelLists.from_lists(video.classes for video in videos)
    digest = dataset_sha256([video.id for video in videos], labels)
    return ValidationMetadata(
        metric="gap", score=gap, k=3, videos=len(videos), dataset_sha256=digest, repeats=1
    )


# An ONNX file


def test_a_whole_onnx_file_holds_all_that_can_be_checked(onnx_file):
    size = onnx_file.stat().st_size

    claims = found(onnx_file, max_size=size)

    assert list(claims) == ["content", "bytes", "weights", "parity", "products", "score"]
    assert claims["content"] == ("holds", "the SHA-256 of the content is the one it names")
    assert claims["bytes"] == (
        "holds", f"{size:,} in 1 file ({format_size(size)}) of {format_size(size)}"
    )  # fmt: skip
    assert claims["weights"] == ("holds", "the types of bf16 only: 82 BFLOAT16")
    verdict, finding = claims["parity"]
    assert verdict == "holds"
    assert 0 < float(finding.split()[3]) < 1e-6
    assert finding.endswith(" from fused.safetensors; the tolerance is 1e-05")
    assert claims["products"] == (
        "holds",
        "numbers are used: 0.0 % as stored, 100.0 % converted at opening, 0.0 % in every run",
    )
    assert claims["score"] == (
        "not checked",
        "GAP@20 0.7500 on 1 video is claimed; name those records to measure it",
    )


def test_a_file_in_blocks_says_how_it_agrees_and_what_it_computes_as_stored(exported_int4, fused):
    claims = found(exported_int4.path, fused=fused["int4"].path)

    proof = exported_int4.proof
    assert claims["weights"] == ("holds", "the types of int4 only: 78 BFLOAT16, 4 INT4")
    assert claims["parity"] == (
        "holds",
        f"probabilities differ by {proof.exact_difference:.2g} from int4.safetensors; the "
        f"tolerance is 1e-05; as it is run they differ by {proof.shipped_difference:.2g}",
    )
    assert claims["products"] == ("holds", f"numbers are used: {proof.shares}")
    assert proof.shares.as_stored > 0.9 * proof.shares.converted_once


def test_a_changed_byte_anywhere_is_seen(onnx_file):
    content = bytearray(onnx_file.read_bytes())
    place = content.index(b"burst 1")
    content[place] ^= 1
    onnx_file.write_bytes(content)

    assert found(onnx_file)["content"] == (
        "fails", "the SHA-256 of the content is not the one it names"
    )  # fmt: skip


def test_a_weight_that_is_no_number_fails_and_so_does_a_byte_too_many(onnx_file):
    model = onnx.load(onnx_file)
    weight = max(
        (each for each in model.graph.initializer if each.name.startswith("member_bag")),
        key=lambda each: len(each.raw_data),
    )
    weight.raw_data = b"\xff" * len(weight.raw_data)
    onnx.save(model, onnx_file)

    claims = found(onnx_file, max_size=onnx_file.stat().st_size - 1)

    assert {name for name, (verdict, _) in claims.items() if verdict == "fails"} == {
        "content", "bytes", "parity"
    }  # fmt: skip
    assert claims["parity"][1].startswith("probabilities differ by nan from ")


def test_a_weight_of_another_type_is_named(onnx_file):
    model = onnx.load(onnx_file)
    weight = next(each for each in model.graph.initializer if each.name.startswith("member_"))
    values = torch.zeros(tuple(weight.dims)).numpy()
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, onnx_file)

    assert found(onnx_file)["weights"] == (
        "fails", f"{weight.name} is FLOAT; the file claims bf16"
    )  # fmt: skip


def test_a_file_without_weights_holds_no_type(onnx_file):
    model = onnx.load(onnx_file)
    del model.graph.initializer[:]
    onnx.save(model, onnx_file)

    claims = found(onnx_file)

    assert claims["weights"] == ("fails", "there are none; the file claims bf16")
    assert claims["parity"][0] == "fails"
    assert claims["parity"][1].startswith(f"ONNX Runtime cannot open {onnx_file}: ")
    assert "\n" not in claims["parity"][1]


def test_the_fused_file_is_known_by_its_hash_not_its_name(onnx_file, fused, records):
    beside = onnx_file.with_name("fused.safetensors")
    digest = load_digest(onnx_file)
    shutil.copy(fused["fp32"].path, beside)
    (onnx_file.parent / "garbage.safetensors").write_bytes(b"garbage")

    assert found(onnx_file)["parity"] == (
        "not checked", f"no fused file with SHA-256 {digest[:12]}... is beside it"
    )  # fmt: skip
    assert found(onnx_file, fused=fused["bf16"].path)["parity"][0] == "holds"
    assert found(onnx_file, fused=fused["fp32"].path)["parity"] == (
        "fails", f"{fused['fp32'].path} has another SHA-256 than is named"
    )  # fmt: skip


def load_digest(path):
    properties = {each.key: each.value for each in onnx.load(path).metadata_props}
    return properties["ensemble_kit.fused_sha256"]


def test_half_an_onnx_file_is_refused(onnx_file):
    onnx_file.write_bytes(onnx_file.read_bytes()[:300_000])

    with pytest.raises(ExportError) as caught:
        verify(onnx_file)

    assert str(caught.value) == (
        f"{onnx_file} is not a whole ONNX file: its fields do not add up.\n"
        "Export the file again, or copy it again from where it is whole."
    )


def test_an_onnx_file_of_another_tool_is_refused(tmp_path):
    onnx.save(onnx.ModelProto(), tmp_path / "other.onnx")

    with pytest.raises(ProviderError) as caught:
        verify(tmp_path / "other.onnx")

    assert str(caught.value) == (
        f"{tmp_path / 'other.onnx'} has no metadata of ensemble-kit.\n"
        "Name a file that `ensemble-kit export-onnx` wrote."
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("repeats", '"three"', "repeats is 'three': Input should be a valid integer"),
        (
            "draw_source",
            "never",
            "draw_source is 'never': Input should be 'fixed', 'random' or 'input'",
        ),
        ("members", "[", "Invalid JSON: "),
    ],
)
def test_damaged_metadata_is_named(key, value, message, onnx_file):
    model = onnx.load(onnx_file)
    (entry,) = [each for each in model.metadata_props if each.key == f"ensemble_kit.{key}"]
    entry.value = value
    onnx.save(model, onnx_file)

    with pytest.raises(ExportError) as caught:
        verify(onnx_file)

    assert str(caught.value).startswith(f"{onnx_file}: its metadata is damaged: {message}")
    assert str(caught.value).endswith(".\nExport the file again with this version of ensemble-kit.")


# A fused file


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [
        ("fp32", "86 F32"),
        ("fp16", "86 F16"),
        ("bf16", "86 BF16"),
        ("int8", "82 BF16, 4 I8"),
        ("int4", "82 BF16, 4 U8"),
    ],
)
def test_a_whole_fused_file_holds_all_that_can_be_checked(dtype, counts, fused):
    claims = found(fused[dtype].path)

    size = fused[dtype].num_bytes
    tensors = 90 if dtype in {"int8", "int4"} else 86
    assert claims == {
        "content": ("holds", "the SHA-256 of the content is the one it names"),
        "bytes": ("holds", f"{size:,} in 1 file ({format_size(size)}) of 1.0 GiB"),
        "weights": ("holds", f"the types of {dtype} only: {counts}"),
        "parents": ("holds", "all 5 have the SHA-256 that is named"),
        "parity": (
            "holds",
            f"all {tensors} tensors are the checkpoints', rounded to {dtype}, which changes a "
            f"probability of made-up videos by {fused[dtype].loss.worst_change:.4f} at most",
        ),
        "score": (
            "not checked",
            "GAP@20 0.7500 on 1 video is claimed; name those records to measure it",
        ),
    }


def set_one(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


NAME = "member_mean.head.experts.bias"


@pytest.mark.parametrize(
    "change",
    [
        set_one(NAME, lambda tensor: tensor + 1),
        set_one(NAME, lambda tensor: tensor.float()),
        lambda tensors: tensors.pop(NAME),
    ],
    ids=["a number", "a type", "a tensor less"],
)
def test_a_fused_file_that_is_not_its_members_is_seen(change, fused, selection):
    path = selection.parent / "changed.safetensors"
    rewritten(path, fused["bf16"].path, change=change)

    try:
        assert found(path)["parity"] == ("fails", f"{NAME} is not the checkpoint's, rounded")
    finally:
        path.unlink()


def test_a_weight_of_another_type_in_a_fused_file_is_named(fused, tmp_path):
    path = rewritten(
        tmp_path / "f.safetensors", fused["bf16"].path, change=set_one(NAME, torch.Tensor.float)
    )

    assert found(path)["weights"] == ("fails", f"{NAME} is F32; the file claims bf16")


def test_a_parent_that_has_changed_fails_and_one_that_has_gone_is_not_checked(
    fused, own_workspace, own_ensemble
):
    path = own_ensemble / fused["bf16"].path.name
    checkpoint = own_workspace.averaged("vlad")
    shutil.copy(own_workspace.averaged("bag"), checkpoint)

    changed = found(path)
    checkpoint.unlink()
    gone = found(path)

    named = "../runs/vlad/averaged.safetensors"
    assert changed["parents"] == ("fails", f"{named} has another SHA-256 than is named")
    assert gone["parents"] == ("not checked", f"1 of 5 are not there, {named} first")
    assert changed["parity"] == gone["parity"] == (
        "not checked", f"{named} is not there as it was fused"
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["checkpoint", "missing"])
def test_what_is_no_fused_file_is_refused(kind, workspace, tmp_path):
    path = workspace.averaged("rnn") if kind == "checkpoint" else tmp_path / "no.safetensors"

    with pytest.raises(CheckpointError) as caught:
        verify(path)

    assert str(caught.value) == (
        f"{path} is a checkpoint file, not a fused file.\nName a fused file instead."
        if kind == "checkpoint"
        else f"{path} does not exist.\nName a file that exists."
    )


# GAP


def test_gap_is_compared_on_the_records_of_the_claim(fused, records, tmp_path):
    source = fused["bf16"].path
    gap = load(source).measure(records, k=3).gap
    text = f"GAP@3 {gap:.4f} on 20 videos"

    def check(claimed, **options):
        path = tmp_path / "f.safetensors"
        seal(rewritten(path, source, validation=claim_of(records, claimed)))
        return found(path, records, **options)["score"]

    assert check(gap) == ("holds", f"{text}; {gap:.4f} is claimed")
    assert check(gap + 9e-4)[0] == check(gap - 0.1)[0] == "holds"
    assert check(gap + 0.0011) == ("fails", f"{text}; {gap + 0.0011:.4f} is claimed")
    assert check(gap + 0.0011, max_gap_loss=0.002)[0] == "holds"


def test_gap_on_other_records_is_told_but_not_compared(fused, workspace, records, tmp_path):
    path = rewritten(
        tmp_path / "f.safetensors", fused["bf16"].path, validation=claim_of(records, 0.99)
    )
    seal(path)
    others = Records([workspace.path / "data" / "test"])
    gap = load(path).measure(others, k=3).gap

    assert found(path, others)["score"] == (
        "not checked",
        f"GAP@3 {gap:.4f} on 18 videos; GAP@3 0.9900 on 20 videos, other ones, is claimed",
    )


def test_gap_of_a_file_that_claims_none_is_told(fused, records, tmp_path):
    path = rewritten(tmp_path / "f.safetensors", fused["bf16"].path, validation=None)
    seal(path)
    gap = load(path).measure(records).gap

    assert found(path)["score"] == ("not checked", "nothing is claimed")
    assert found(path, records)["score"] == (
        "not checked", f"GAP@20 {gap:.4f} on 20 videos; nothing is claimed"
    )  # fmt: skip


def test_an_onnx_file_claims_the_gap_of_its_fused_file(onnx_file, records):
    model = onnx.load(onnx_file)
    (entry,) = [e for e in model.metadata_props if e.key == "ensemble_kit.validation"]
    entry.value = claim_of(records, 0.999).model_dump_json()
    onnx.save(model, onnx_file)
    gap = load(onnx_file).measure(records, k=3).gap

    assert found(onnx_file, records)["score"] == (
        "fails", f"GAP@3 {gap:.4f} on 20 videos; 0.9990 is claimed"
    )  # fmt: skip


def test_records_of_another_vocabulary_are_refused(fused, records):
    names = tuple("abcdef")
    records.schema = records.schema.model_copy(update={"label_names": names})

    with pytest.raises(PredictionsError) as caught:
        verify(fused["bf16"].path, records)

    assert str(caught.value) == (
        f"{fused['bf16'].path} calls class 0 'steady 0', but these records call it 'a'.\n"
        "Use records of the same vocabulary, or their own --label-names."
    )


@pytest.mark.parametrize("where", ["a weight", "the last number", "the text of a recipe"])
def test_a_fused_file_that_was_moved_and_has_a_flipped_bit_does_not_hold(where, fused, tmp_path):
    moved = tmp_path / "moved.safetensors"
    content = bytearray(fused["bf16"].path.read_bytes())
    title = content.index(b"title")
    places = {"a weight": -5000, "the last number": -1, "the text of a recipe": title + 12}
    content[places[where]] ^= 1
    moved.write_bytes(content)

    claims = {claim.name: claim for claim in verify(moved)}

    assert claims["content"].verdict == "fails"
    assert claims["content"].finding == "the SHA-256 of the content is not the one it names"
