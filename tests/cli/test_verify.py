"""ensemble-kit verify."""

import json

import pytest

from ensemble_kit.cli import main
from ensemble_kit.verification import Claim

CLAIMS = [Claim("content", "holds", "it is whole"), Claim("score", "not checked", "no records")]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Note what the command asks of the library, which finds ``CLAIMS``."""
    calls = []

    def note(path, records, **options):
        calls.append((path.name, records, options))
        return CLAIMS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.onnx").touch()
    (tmp_path / "f.safetensors").touch()
    monkeypatch.setattr("ensemble_kit.verification.verify", note)
    return calls


def test_a_file_that_holds_its_claims_ends_well(runner, asked):
    result = runner.invoke(main, ["verify", "e.onnx"])

    assert result.exit_code == 0, result.output
    assert asked == [("e.onnx", None, {"fused": None, "max_size": 2**30, "max_gap_loss": 0.001})]
    assert result.stdout == (
        "content   holds        it is whole\nscore     not checked  no records\n"
    )


def test_all_of_it_is_an_option(runner, asked, workspace):
    data = str(workspace.path / "data" / "validate")
    words = ["--fused", "f.safetensors", "--max-size", "1GB", "--max-gap-loss", "0.01"]

    result = runner.invoke(main, ["verify", "e.onnx", data, *words, "--json"])

    ((_, records, options),) = asked
    assert records.patterns == (data,)
    assert (options["fused"].name, options["max_size"]) == ("f.safetensors", 10**9)
    assert options["max_gap_loss"] == 0.01
    assert json.loads(result.stdout) == {
        "file": "e.onnx",
        "holds": True,
        "claims": [
            {"name": "content", "verdict": "holds", "finding": "it is whole"},
            {"name": "score", "verdict": "not checked", "finding": "no records"},
        ],
    }


def test_a_real_file_that_fails_says_so_in_a_line_each_and_exits_with_1(runner, exported):
    words = ["verify", str(exported.path), "--max-size", "1KiB"]

    result = runner.invoke(main, words)
    as_json = runner.invoke(main, [*words, "--json"])

    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "content", "bytes", "weights", "parity", "products", "score"
    ]  # fmt: skip
    assert lines[1] == (
        f"bytes     fails        {exported.num_bytes:,} in 1 file "
        f"({exported.num_bytes / 2**10:.1f} KiB) of 1.0 KiB"
    )
    assert (result.exit_code, as_json.exit_code) == (1, 1)
    assert json.loads(as_json.stdout)["holds"] is False
    assert result.stderr == as_json.stderr == (
        f"Error: {exported.path} does not hold 1 of its 6 claims: bytes.\n"
        "Make the file again, or copy it again from where it is whole.\n"
    )  # fmt: skip


def test_a_fused_file_has_no_fused_file_of_its_own(runner, asked):
    result = runner.invoke(main, ["verify", "f.safetensors", "--fused", "f.safetensors"])

    assert result.exit_code == 2
    assert "--fused belongs to an ONNX file." in result.stderr
