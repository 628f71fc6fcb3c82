import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ensemble_kit.cli import main
from ensemble_kit.export.stage import ExportedFile
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.triton import TritonConfig
from ensemble_kit.store.provenance import ProofMetadata, SharesMetadata

SHARES = SharesMetadata(as_stored=975, converted_once=25, converted_in_every_run=0)
PROOF = ProofMetadata(exact_difference=1.2e-7, shipped_difference=None, shares=SHARES, gap=None)


@pytest.fixture
def asked(monkeypatch):
    """Note what the command asks of the library, and write nothing."""
    calls = []

    def note(fused, output, **options):
        calls.append((str(fused), str(output), options))
        size, repeats = options["max_size"], options["repeats"]
        return ExportedFile(output, 3 * 2**20, size, repeats, PROOF, output.with_name("README.md"))

    monkeypatch.setattr("ensemble_kit.export.stage.export_onnx", note)
    return calls


def test_a_workspace_needs_no_argument(runner, asked):
    result = runner.invoke(main, ["export-onnx"])

    assert result.exit_code == 0, result.output
    options = {
        "repeats": 10, "draw_source": "fixed", "input_type": None, "low_memory": False,
        "triton": None, "triton_config": TritonConfig(),
        "max_size": 2**30, "force": False, "records": None, "max_gap_loss": 0.001,
        "opset": None, "measures": False,
    }  # fmt: skip
    assert asked == [("ensemble/fused.safetensors", "ensemble/ensemble.onnx", options)]
    assert result.stdout == (
        "ensemble/ensemble.onnx: 3.0 MiB of 1.0 GiB, 10 repeats.\n"
        "ONNX Runtime agrees with PyTorch to 1.2e-07.\n"
        "Numbers are used: 97.5 % as stored, 2.5 % converted at opening, 0.0 % in every run.\n"
        "Model card: ensemble/README.md.\n"
    )


def test_all_of_it_is_an_option(runner, asked):
    words = ["f.safetensors", "-o", "e.onnx", "--repeats", "3", "--max-size", "1GB", "--force"]
    words += ["--draw-source", "input", "--input", "float32", "--low-memory", "--triton", "models"]
    words += ["--triton-instances", "2", "--triton-delay", "500", "--triton-warm-up", "--measure"]
    words += ["--max-gap-loss", "0.02", "--opset", "20"]

    result = runner.invoke(main, ["export-onnx", *words])

    options = {
        "repeats": 3, "draw_source": "input", "input_type": "float32", "low_memory": True,
        "triton": Path("models"), "triton_config": TritonConfig(2, 500, True),
        "max_size": 10**9, "force": True, "records": None,
        "max_gap_loss": 0.02, "opset": 20, "measures": True,
    }  # fmt: skip
    assert asked == [("f.safetensors", "e.onnx", options)]
    assert result.stdout.startswith("e.onnx: 3.1 MB of 1.0 GB, 3 repeats.\n")


def test_a_readme_that_stays_is_told(runner, monkeypatch):
    kept = ExportedFile(Path("e.onnx"), 1, 1, 1, PROOF, None)
    monkeypatch.setattr("ensemble_kit.export.stage.export_onnx", lambda *_, **__: kept)

    result = runner.invoke(main, ["export-onnx"])

    assert result.stdout.splitlines()[-1] == (
        "Model card: README.md was there and is left as it is."
    )


def test_a_file_over_the_limit_is_an_error_and_is_not_there(
    runner, fused, built, tmp_path, monkeypatch
):
    output = tmp_path / "e.onnx"
    monkeypatch.setattr("ensemble_kit.export.stage.build_graph", lambda *_, **__: built)

    result = runner.invoke(
        main, ["export-onnx", str(fused["bf16"].path), "-o", str(output), "--max-size", "1KiB"]
    )

    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        r"Error: The ONNX file has \d{3},\d{3} bytes \(\d+\.\d KiB\), \d{3},\d{3} bytes "
        r"\(\d+\.\d KiB\) over the limit of 1\.0 KiB\. Without mean it would lose the least "
        r"\(GAP@20 0\.5000, 0\.2500 less\), but not fit\.\n"
        r"Train smaller members, or raise --max-size here\.\n",
        result.stderr,
    )
    assert not list(tmp_path.iterdir())


def test_what_is_no_fused_file_is_an_error(runner, workspace, tmp_path):
    path = workspace.averaged("bag")

    result = runner.invoke(main, ["export-onnx", str(path), "-o", str(tmp_path / "e.onnx")])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {path} is a checkpoint file, not a fused file.\nName a fused file instead.\n"
    )


def test_nothing_is_overwritten_without_force(runner, exported, fused, tmp_path):
    output = shutil.copy(exported.path, tmp_path / "e.onnx")

    result = runner.invoke(main, ["export-onnx", str(fused["bf16"].path), "-o", str(output)])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {output} exists already.\nName another output, or replace it with --force.\n"
    )
    assert OnnxEnsemble(output).metadata["repeats"] == "3"


def test_no_repeat_is_an_error_of_usage(runner):
    result = runner.invoke(main, ["export-onnx", "--repeats", "0"])

    assert result.exit_code == 2
    assert "0 is not in the range x>=1." in result.stderr


def test_a_file_in_blocks_is_measured_as_it_is_run_and_carries_the_figures(
    runner, fused, workspace, tmp_path
):
    output = tmp_path / "e.onnx"
    data = str(workspace.path / "data" / "validate")

    result = runner.invoke(
        main, ["export-onnx", str(fused["int4"].path), "-o", str(output), "--data", data]
    )

    assert result.exit_code == 0, result.output
    proof = read_metadata(output).proof
    lines = result.stdout.splitlines()
    assert lines[1] == (
        f"ONNX Runtime agrees with PyTorch to {proof.exact_difference:.2g} with exact sums, and to "
        f"{proof.shipped_difference:.2g} as it is run."
    )
    assert lines[2] == f"Numbers are used: {proof.shares}."
    assert proof.shares.converted_in_every_run == 0 < proof.shares.as_stored
    assert lines[3] == (
        f"GAP on 20 videos: {proof.gap.exact:.4f} with the same weights in float32, "
        f"{proof.gap.shipped:.4f} as it is run."
    )
    assert (proof.gap.k, proof.gap.videos) == (20, 20)


def test_a_file_that_loses_gap_by_packed_products_is_not_kept(
    runner, fused, workspace, tmp_path, monkeypatch
):
    output = tmp_path / "e.onnx"
    gaps = iter([0.5, 0.6])  # as it is run, and in float32
    metrics = SimpleNamespace(videos=1234)

    def measure(run, records, *, k):
        return SimpleNamespace(**vars(metrics), gap=next(gaps))

    monkeypatch.setattr("ensemble_kit.export.stage.measure", measure)
    data = str(workspace.path / "data" / "validate")

    result = runner.invoke(
        main, ["export-onnx", str(fused["int8"].path), "-o", str(output), "--data", data]
    )

    assert result.exit_code == 1
    assert result.stderr.endswith(
        f"Error: {output}: computing from packed numbers lowers GAP@20 by 0.1000, from 0.6000 to "
        "0.5000 on 1,234 videos; the limit is 0.001.\n"
        "Fuse with another --dtype, or raise --max-gap-loss.\n"
    )
    assert not output.exists()


def test_how_triton_serves_it_needs_a_repository(runner, asked):
    result = runner.invoke(main, ["export-onnx", "f.safetensors", "--triton-delay", "500"])

    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: --triton-... belong to a model repository; name one with --triton.\n"
    )
    assert asked == []
