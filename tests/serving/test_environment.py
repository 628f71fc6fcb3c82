"""A server's environment: Python with NumPy, ONNX Runtime and the kit's own files, nothing else."""

import json
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from workspace_fixture import NUM_VIDEOS

import ensemble_kit
from ensemble_kit.data.dataset import Records
from ensemble_kit.runtime import OnnxEnsemble

SCRIPT = """
import importlib.util, json, sys
import numpy as np
from ensemble_kit.runtime import OnnxEnsemble

model, inputs, outputs = sys.argv[1:]
arrays = dict(np.load(inputs))
num_frames = arrays.pop("num_frames")
tags = OnnxEnsemble(model).run(arrays, num_frames)
np.savez(outputs, probabilities=tags.probabilities, confidences=tags.confidences)
absent = ["torch", "onnx", "pydantic", "safetensors", "click", "crc32c", "pip", "rich"]
print(json.dumps({
    "present": [name for name in absent if importlib.util.find_spec(name)],
    "labels": tags.labels.tolist(),
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of a new environment, into which installed packages are linked one by one."""
    folder = tmp_path_factory.mktemp("server")
    venv.create(folder, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    if not packages.is_dir():
        pytest.skip("environments of this system have another layout")
    for name in ("numpy", runtime_package()):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "bin")}:
            (packages / top).symlink_to(found.locate_file(top))
    (packages / "ensemble_kit").symlink_to(Path(ensemble_kit.__file__).parent)
    return folder / "bin" / "python"


def runtime_package():
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return distribution(name).metadata["Name"]
        except PackageNotFoundError:
            pass
    return pytest.fail("ONNX Runtime is not installed")


def test_a_server_with_numpy_and_onnx_runtime_alone_gives_the_same_tags(
    python, exported, workspace, tmp_path
):
    (batch,) = Records([workspace.path / "data" / "test"]).batches(NUM_VIDEOS["test"])
    expected = OnnxEnsemble(exported.path).run(batch.frames, batch.num_frames)
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "outputs.npz"
    np.savez(inputs, num_frames=batch.num_frames, **batch.frames)
    (tmp_path / "serve.py").write_text(SCRIPT)

    result = subprocess.run(
        [python, "-I", tmp_path / "serve.py", exported.path, inputs, outputs],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["present"] == []
    assert said["labels"] == expected.labels.tolist()
    with np.load(outputs) as found:
        np.testing.assert_array_equal(found["probabilities"], expected.probabilities)
        np.testing.assert_array_equal(found["confidences"], expected.confidences)
    assert len(expected.labels) == NUM_VIDEOS["test"]


def test_a_command_that_lacks_a_library_says_which(python, tmp_path):
    done = subprocess.run(
        [python, "-m", "ensemble_kit", "select"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr == (
        "Error: This command needs the library click, which is not installed.\n"
        "Install the kit with all that it needs: pip install ensemble-kit\n"
    )
