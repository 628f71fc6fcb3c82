"""What select counts is what fuse writes, to the byte, and each member is in its precision."""

import random

import numpy as np
import pytest
import torch
from builders import tiny_recipe, tiny_schema, write_checkpoint
from workspace_fixture import MEMBERS, Workspace, write_selection_of

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import SelectionError
from ensemble_kit.export.stage import export_onnx
from ensemble_kit.fusion.stage import fuse
from ensemble_kit.networks.fused_member import model_metadata
from ensemble_kit.networks.loading import load_fused
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.selection.stage import select
from ensemble_kit.store.provenance import FusedMetadata
from ensemble_kit.store.selection_file import read_selection
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.verification import verify

POOLINGS = ("average", "soft_bof", "netvlad", "gru")


def predict_as(path, checkpoint, name, dtype, rows, schema):
    """Write made-up predictions of a checkpoint that was run in a precision."""
    with open_tensors(checkpoint) as file:
        model = model_metadata(file, path.parent, repeats=1, dtype=dtype)
    return write_predictions(
        path,
        ids=[f"video{index}" for index in range(len(rows))],
        label_names=schema.names,
        labels=LabelLists.from_lists([[index % 4] for index in range(len(rows))]),
        rows=rows.astype(np.float32),
        name=name,
        model=model,
        force=False,
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_bytes_that_are_selected_are_those_of_the_fused_file(seed, tmp_path):
    choice, rng = random.Random(seed), np.random.default_rng(seed)
    schema = tiny_schema()
    paths = []
    for index in range(choice.randint(1, 4)):
        name = "m" * choice.choice((1, 7, 150)) + str(index)
        text = tiny_recipe(pooling=choice.choice(POOLINGS))
        checkpoint = tmp_path / "runs" / name / "averaged.safetensors"
        write_checkpoint(checkpoint, text, schema, seed=index, name=name)
        for dtype in choice.sample([None, "fp32", "fp16", "bf16", "int8", "int4"], 3):
            paths.append(checkpoint.with_name(f"{dtype}.safetensors"))
            predict_as(paths[-1], checkpoint, name, dtype, rng.random((9, 4)), schema)
    output = tmp_path / "ensemble" / "selection.json"

    selection = select(
        paths, output=output, dtype="auto", mixing=choice.choice(("gap", "optimised")), resamples=0
    )
    fused = fuse(output, output.with_name("fused.safetensors"))

    assert selection.bytes == fused.num_bytes == fused.path.stat().st_size
    assert selection.bytes == selection.shared_bytes + sum(m.bytes for m in selection.members)
    assert fused.dtypes == tuple(member.dtype for member in selection.members)


MIXED = {"mean": "fp32", "bag": "bf16", "vlad": "int4", "rnn": "int8"}


@pytest.fixture(scope="module")
def mixed(workspace: Workspace, tmp_path_factory):
    """The four members of the workspace, each fused in another precision."""
    selection = write_selection_of(
        tmp_path_factory.mktemp("mixed") / "selection.json",
        {name: workspace.averaged(name) for name in MEMBERS},
        dict.fromkeys(MEMBERS, 0.25),
        dtypes=MIXED,
    )
    return fuse(selection, selection.with_name("fused.safetensors"))


def test_each_member_is_stored_in_the_precision_that_it_was_selected_in(mixed, fused):
    selection = read_selection(mixed.path.with_name("selection.json"))
    assert mixed.num_bytes == mixed.path.stat().st_size == selection.bytes

    with open_tensors(mixed.path) as file:
        assert {m.name: m.dtype for m in file.metadata_as(FusedMetadata).members} == MIXED
        for member, dtype in MIXED.items():
            with open_tensors(fused[dtype].path) as other:
                names = [name for name in other.specs if name.startswith(f"member_{member}.")]
                assert names
                for name in names:
                    assert torch.equal(file.tensor(name), other.tensor(name)), name
        assert set(load_fused(file, repeats=1).names) == set(MIXED)


def test_a_file_of_several_precisions_is_exported_and_verified(mixed):
    exported = export_onnx(mixed.path, mixed.path.with_name("ensemble.onnx"), repeats=2)

    shares = exported.proof.shares
    assert shares.as_stored > 0 < shares.converted_once
    assert shares.converted_in_every_run == 0
    for path in (mixed.path, exported.path):
        claims = {claim.name: claim for claim in verify(path)}
        assert "fails" not in {claim.verdict for claim in claims.values()}
        assert "fp32 and bf16 and int8 and int4 only: " in claims["weights"].finding
    assert "stored as fp32 and bf16 and int8 and int4" in exported.card.read_text()


def test_a_selection_in_a_precision_that_was_not_measured_is_refused(workspace, tmp_path):
    selection = write_selection_of(
        tmp_path / "selection.json", {"rnn": workspace.averaged("rnn")}, {"rnn": 1.0}
    )
    text = selection.read_text().replace(
        '"dtype": "bf16",\n      "coeff', '"dtype": "int4",\n      "coeff'
    )
    selection.write_text(text)

    with pytest.raises(SelectionError) as caught:
        fuse(selection, tmp_path / "fused.safetensors")

    assert "member rnn is in int4, but was measured in bf16" in str(caught.value)
    assert not (tmp_path / "fused.safetensors").exists()
