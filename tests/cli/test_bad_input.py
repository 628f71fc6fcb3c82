"""Damaged files and full disks: one line, exit code 1, no partial file, the old file as it was."""

import contextlib
import resource
import struct

import numpy as np
import onnx
import pytest
import torch
from builders import contents_of
from foreign_models import write_foreign
from safetensors import safe_open
from safetensors.torch import save_file

from ensemble_kit.cli import main

TEST = "data/test/*.tfrecord"
MAPPING = ["--input", "rgb=pixels", "--num-frames", "lengths", "--activation", "sigmoid"]
OLD = b"what was there before"


@pytest.fixture
def files(fused, exported, own_workspace, own_ensemble):
    """A file of each kind that commands read, in a folder to write into."""
    folder = own_workspace.path
    write_foreign(folder / "foreign.onnx")
    return {
        "checkpoint": own_workspace.averaged("bag"),
        "fused": own_ensemble / fused["bf16"].path.name,
        "onnx": own_ensemble / exported.path.name,
        "foreign": folder / "foreign.onnx",
    }


COMMANDS = {
    "predict": ("checkpoint", "fused", "onnx"),
    "evaluate": ("checkpoint", "fused", "onnx"),
    "export-onnx": ("fused",),
    "import-onnx": ("foreign",),
}


def words_of(command, model, output):
    return {
        "predict": ["predict", model, TEST, "-o", output, "--force"],
        "evaluate": ["evaluate", model, TEST],
        "export-onnx": ["export-onnx", model, "-o", output, "--force"],
        "import-onnx": ["import-onnx", model, TEST, *MAPPING, "-o", output, "--force"],
        "fuse": ["fuse", model, "-o", output, "--force"],
        "select": ["select", *model, "-o", output, "--force"],
    }[command]


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def say_more(path):
    """Say that the first part has more bytes than there are."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".onnx":
        path.write_bytes(b"\x3a\xff\xff\xff\xff\x07" + content)  # a graph of 2 GB
    else:
        content[:8] = struct.pack("<Q", 2**60)
        path.write_bytes(content)


def overlap(path):
    """Let two tensors share their bytes, or a tensor lie where another file does."""
    if path.suffix == ".onnx":
        model = onnx.load(path)
        tensor = next(each for each in model.graph.initializer if each.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../../../../etc/passwd")
        path.write_bytes(model.SerializeToString())
        return
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size]
    first = header.index(b'"data_offsets": [0, ')
    second = header.index(b'"data_offsets": [', first + 20)
    width = len(b'"data_offsets": [')
    number = header[second + width :].split(b",")[0]
    changed = (
        header[: second + width] + b"0".rjust(len(number)) + header[second + width + len(number) :]
    )
    path.write_bytes(content[:8] + changed + content[8 + size :])


def spoil(path):
    """Put a NaN among the weights."""
    if path.suffix == ".onnx":
        model = onnx.load(path)
        tensor = next(each for each in model.graph.initializer if len(each.dims) == 2)
        tensor.raw_data = np.full(tuple(tensor.dims), np.nan, np.float32).tobytes()
        path.write_bytes(model.SerializeToString())
        return
    tensors = contents_of(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = torch.nan
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


@contextlib.contextmanager
def kept(folder, output):
    """Write something in the output's place; it must be as it was, and nothing beside it, after."""
    output.write_bytes(OLD)
    before = set(folder.rglob("*"))
    yield
    assert output.read_bytes() == OLD
    assert set(folder.rglob("*")) == before


DAMAGES = (cut, halve, empty, say_more, overlap, spoil)
CASES = [
    pytest.param(command, kind, damage, id=f"{command}-{kind}-{damage.__name__}")
    for command, kinds in COMMANDS.items()
    for kind in kinds
    for damage in DAMAGES
]


@pytest.mark.usefixtures("import_in_this_process")
@pytest.mark.parametrize(("command", "kind", "damage"), CASES)
def test_a_damaged_model_is_one_error_that_names_it(
    command, kind, damage, runner, files, built, own_workspace, monkeypatch
):
    monkeypatch.setattr("ensemble_kit.export.stage.build_graph", lambda *_, **__: built)
    suffix = ".onnx" if command == "export-onnx" else ".safetensors"
    output = own_workspace.path / f"output{suffix}"
    damage(files[kind])

    with kept(own_workspace.path, output):
        result = runner.invoke(main, words_of(command, str(files[kind]), str(output)))

    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("Error: ")
    assert str(files[kind]) in result.stderr
    assert isinstance(result.exception, SystemExit)


@contextlib.contextmanager
def full_disk(num_bytes):
    """Let no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("predict", "p.safetensors"),
        ("predict", "p.csv"),
        ("select", "s.json"),
        ("fuse", "f.safetensors"),
        ("export-onnx", "e.onnx"),
        ("import-onnx", "i.safetensors"),
    ],
)
def test_a_disk_that_is_full_half_way_is_one_error(
    command, name, runner, files, built, own_workspace, monkeypatch
):
    monkeypatch.setattr("ensemble_kit.export.stage.build_graph", lambda *_, **__: built)
    output = own_workspace.path / name
    model = {
        "select": sorted(map(str, own_workspace.path.glob("runs/*/validation.safetensors"))),
        "fuse": "ensemble/selection.json",
        "export-onnx": str(files["fused"]),
        "import-onnx": str(files["foreign"]),
    }.get(command, str(files["checkpoint"]))

    with kept(own_workspace.path, output), full_disk(200):
        result = runner.invoke(main, words_of(command, model, str(output)))

    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.endswith(
        f"Error: {output} cannot be written: File too large.\n"
        "Free some space or name another folder; nothing was left half-written.\n"
    )
