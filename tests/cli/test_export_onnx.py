import re
import shutil
from pathlib import Path

import pytest

from ensemble_kit.cli import main
from ensemble_kit.export.stage import ExportedFile
from ensemble_kit.runtime import OnnxEnsemble


@pytest.fixture
def asked(monkeypatch):
    """Note what the command asks of the library, and write nothing."""
    calls = []

    def note(fused, output, **options):
        calls.append((str(fused), str(output), options))
        size, repeats = options["max_size"], options["repeats"]
        return ExportedFile(output, 3 * 2**20, size, repeats, 1.2e-7, output.with_name("README.md"))

    monkeypatch.setattr("ensemble_kit.export.stage.export_onnx", note)
    return calls


def test_a_workspace_needs_no_argument(runner, asked):
    result = runner.invoke(main, ["export-onnx"])

    assert result.exit_code == 0, result.output
    options = {
        "repeats": 10, "sampling": "fixed", "input_type": None, "low_memory": False,
        "triton": None, "max_size": 2**30, "force": False,
    }  # fmt: skip
    assert asked == [("ensemble/fused.safetensors", "ensemble/ensemble.onnx", options)]
    assert result.stdout == (
        "ensemble/ensemble.onnx: 3.0 MiB of 1.0 GiB, 10 repeats.\n"
        "ONNX Runtime agrees with PyTorch to 1.2e-07.\n"
        "Model card: ensemble/README.md.\n"
    )


def test_all_of_it_is_an_option(runner, asked):
    words = ["f.safetensors", "-o", "e.onnx", "--repeats", "3", "--max-size", "1GB", "--force"]
    words += ["--sampling", "input", "--input", "float32", "--low-memory", "--triton", "models"]

    result = runner.invoke(main, ["export-onnx", *words])

    options = {
        "repeats": 3, "sampling": "input", "input_type": "float32", "low_memory": True,
        "triton": Path("models"), "max_size": 10**9, "force": True,
    }  # fmt: skip
    assert asked == [("f.safetensors", "e.onnx", options)]
    assert result.stdout.startswith("e.onnx: 3.1 MB of 1.0 GB, 3 repeats.\n")


def test_a_readme_that_stays_is_told(runner, monkeypatch):
    kept = ExportedFile(Path("e.onnx"), 1, 1, 1, 0.0, None)
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
        r"\(\d+\.\d KiB\) over the limit of 1\.0 KiB\. Nothing that selection measured would fit "
        r"in bf16\.\n"
        r"Train smaller members, fuse in a smaller --dtype, or raise --max-size here\.\n",
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


def test_no_repeat_is_a_fault_of_usage(runner):
    result = runner.invoke(main, ["export-onnx", "--repeats", "0"])

    assert result.exit_code == 2
    assert "0 is not in the range x>=1." in result.stderr
