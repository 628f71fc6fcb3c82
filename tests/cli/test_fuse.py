import re
from pathlib import Path

import pytest
from workspace_fixture import COEFFICIENTS, MEMBERS, write_selection_of

from ensemble_kit.choices import MAX_GAP_LOSS
from ensemble_kit.cli import main
from ensemble_kit.fusion.gap_loss import Loss
from ensemble_kit.fusion.stage import FusedFile
from ensemble_kit.store.provenance import FusedMetadata
from ensemble_kit.store.selection_file import read_selection
from ensemble_kit.store.tensor_files import open_tensors

NUMBER = r"\d\.?\d*(e-\d\d)?"


@pytest.fixture
def selected(own_workspace):
    """A selection where `ensemble-kit select` puts it."""
    folder = own_workspace.path / "ensemble"
    for path in folder.glob("*"):
        path.unlink()
    return write_selection_of(
        folder / "selection.json",
        {name: own_workspace.averaged(name) for name in MEMBERS},
        COEFFICIENTS,
        frontier={("rnn", "bag"): 0.7449},
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_type_is_an_option(dtype, runner, selected):
    result = runner.invoke(main, ["fuse", "--dtype", dtype])

    assert result.exit_code == 0, result.output
    size = {"fp32": "1.5 MiB", "bf16": r"79\d\.\d KiB", "int8": r"41\d\.\d KiB"}[dtype]
    change = "0" if dtype == "fp32" else NUMBER
    assert re.fullmatch(
        rf"ensemble/fused\.safetensors: 4 members in {dtype}, {size} of 1\.0 GiB\.\n"
        rf"Equal to its members; rounding to {dtype} changed a probability of made-up videos "
        rf"by {change} at most, {change} on average\.\n",
        result.stdout,
    )
    with open_tensors(selected.parent / "fused.safetensors") as file:
        metadata = file.metadata_as(FusedMetadata)
    assert {member.dtype for member in metadata.members} == {dtype}
    assert metadata.selection.path == "selection.json"


def test_records_say_what_rounding_costs(runner, selected):
    result = runner.invoke(main, ["fuse", "--dtype", "int8", "--data", "data/validate"])

    assert result.exit_code == 0, result.output
    assert re.fullmatch(
        r"GAP on 20 videos: 0\.\d{4} before rounding, 0\.\d{4} after\.",
        result.stdout.splitlines()[2],
    )


def test_given_coefficients_and_what_is_too_near_0_for_fp16_are_said(runner, monkeypatch):
    found = FusedFile(
        Path("f.safetensors"),
        2**20,
        2**30,
        ("a", "b"),
        ("fp16", "fp16"),
        Loss(0.5, 0.25),
        ("member_a.x", "member_a.y"),
        "given",
    )
    asked = {}
    monkeypatch.setattr(
        "ensemble_kit.fusion.stage.fuse", lambda *_, **options: asked.update(options) or found
    )

    result = runner.invoke(main, ["fuse", "--dtype", "fp16", "--max-gap-loss", "0.25"])

    assert result.stdout == (
        "f.safetensors: 2 members in fp16, 1.0 MiB of 1.0 GiB.\n"
        "Equal to its members; rounding to fp16 changed a probability of made-up videos by 0.5 at "
        "most, 0.25 on average.\n"
        "The members are mixed by coefficients that were given, not chosen.\n"
        "2 tensors are too near 0 for fp16, member_a.x first; bf16 would lose less of them.\n"
    )
    assert (asked["max_gap_loss"], asked["records"]) == (0.25, None)


def test_a_thousandth_of_gap_may_be_lost_unless_another_limit_is_given(runner, monkeypatch):
    fused = FusedFile(
        Path("f.safetensors"), 2**20, 2**30, ("a",), ("bf16",), Loss(0.0, 0.0), (), "gap"
    )
    asked = {}
    monkeypatch.setattr(
        "ensemble_kit.fusion.stage.fuse", lambda *_, **options: asked.update(options) or fused
    )

    assert runner.invoke(main, ["fuse"]).exit_code == 0

    assert asked["max_gap_loss"] == 0.001 == MAX_GAP_LOSS


def test_bf16_is_the_default(runner, selected):
    runner.invoke(main, ["fuse"])

    with open_tensors(selected.parent / "fused.safetensors") as file:
        assert {spec.dtype for spec in file.specs.values()} == {"BF16"}


def test_selection_and_output_may_be_elsewhere(runner, selected, own_workspace):
    (own_workspace.path / "else").mkdir()
    other = write_selection_of(
        own_workspace.path / "else" / "s.json", {"rnn": own_workspace.averaged("rnn")}, {"rnn": 1.0}
    )

    result = runner.invoke(main, ["fuse", "else/s.json", "-o", "out/f.safetensors"])

    assert result.exit_code == 0, result.output
    with open_tensors(own_workspace.path / "out" / "f.safetensors") as file:
        metadata = file.metadata_as(FusedMetadata)
    assert metadata.selection.path == "../else/s.json"
    assert metadata.members[0].checkpoint.path == "../runs/rnn/averaged.safetensors"
    assert read_selection(other).members[0].model.file.path == "../runs/rnn/averaged.safetensors"


def test_over_the_limit_nothing_is_written_and_the_exit_code_is_1(runner, selected):
    result = runner.invoke(main, ["fuse", "--max-size", "700KiB"])

    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        r"Error: The fused file has \d{3},\d{3} bytes \(7\d\d\.\d KiB\), \d+,\d{3} bytes "
        r"\(\d+\.\d KiB\) over the limit of 700\.0 KiB\. Without vlad it would fit and lose the "
        r"least: GAP@20 0\.5000, 0\.2500 less\. In int8 all would fit, in 4\d\d\.\d KiB\. Of what "
        r"selection measured, rnn \+ bag would fit and score best: GAP@20 0\.7449 in \d+\.\d "
        r"KiB\.\nFuse with --dtype int8, select again with --max-size 716800, or raise --max-size "
        r"here\.\n",
        result.stderr,
    )
    assert [path.name for path in selected.parent.iterdir()] == ["selection.json"]


def test_selecting_as_the_message_says_makes_room(runner, selected):
    runner.invoke(main, ["select", "--force"])
    assert len(read_selection(selected).members) > 1
    runner.invoke(main, ["fuse"])
    limit = selected.with_name("fused.safetensors").stat().st_size - 1

    refused = runner.invoke(main, ["fuse", "--force", "--max-size", str(limit)])
    hint = re.search(r"select again with --max-size (\d+), or", refused.stderr)
    again = runner.invoke(main, ["select", "--dtype", "bf16", "--max-size", hint[1], "--force"])
    fused = runner.invoke(main, ["fuse", "--force", "--max-size", str(limit)])

    assert (refused.exit_code, again.exit_code, fused.exit_code) == (1, 0, 0), fused.output


def test_a_member_that_was_trained_on_is_refused(runner, selected, own_workspace):
    path = own_workspace.averaged("bag")
    path.unlink()
    again = runner.invoke(main, ["average", "runs/bag", "--last", "2", "--even-if-worse"])
    assert again.exit_code == 0, again.stderr

    result = runner.invoke(main, ["fuse"])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: ensemble/../runs/bag/averaged.safetensors has changed since member bag was "
        "selected.\nPredict and select again, so that the selection describes what is fused.\n"
    )


def test_nothing_is_overwritten_without_force(runner, selected):
    first = runner.invoke(main, ["fuse"])
    refused = runner.invoke(main, ["fuse", "--dtype", "fp32"])
    forced = runner.invoke(main, ["fuse", "--dtype", "fp32", "--force"])

    assert (first.exit_code, refused.exit_code, forced.exit_code) == (0, 1, 0)
    assert refused.stderr == (
        "Error: ensemble/fused.safetensors exists already.\n"
        "Name another output, or replace it with --force.\n"
    )


def test_a_type_that_is_not_there_is_an_error_of_usage(runner, selected):
    result = runner.invoke(main, ["fuse", "--dtype", "int5"])

    assert result.exit_code == 2
    assert "'int5' is not one of 'fp32', 'fp16', 'bf16', 'int8', 'int4'" in result.stderr
