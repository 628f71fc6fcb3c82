"""The public face of serving, in an environment with NumPy and ONNX Runtime alone."""

import json
import re
import shutil
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest

import ensemble_kit
from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.runtime import OnnxEnsemble

SERVE = """
import json, sys
from importlib.metadata import distributions
import numpy as np
from ensemble_kit.runtime import OnnxEnsemble

path, asked, answered = sys.argv[1:]
frames = dict(np.load(asked))
num_frames = frames.pop("num_frames")
np.save(answered, OnnxEnsemble(path).run(frames, num_frames).probabilities)
print(json.dumps(sorted(installed.name for installed in distributions())))
"""


def with_requirements(name):
    """Return a distribution and all that it requires, by name; its extras are left out."""
    found, waiting = {}, [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = distribution(name)
            lines = [line for line in found[name].requires or [] if "extra ==" not in line]
            waiting += [re.match(r"[\w.-]+", line)[0] for line in lines]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The Python of a new environment, and the distributions that are in it.

    They are links to those of this environment, so that nothing is downloaded. The kit is a copy.
    """
    folder = tmp_path_factory.mktemp("server")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    try:
        found = with_requirements("onnxruntime-gpu")
    except PackageNotFoundError:  # where there is no wheel for a GPU
        found = with_requirements("onnxruntime")
    for installed in found.values():
        for top in {file.parts[0] for file in installed.files} - {".."}:
            (packages / top).symlink_to(installed.locate_file(top))
    shutil.copytree(Path(ensemble_kit.__file__).parent, packages / "ensemble_kit")
    return folder / "bin" / "python", sorted(found)


def test_an_environment_with_numpy_and_onnx_runtime_runs_an_exported_file(
    server, exported, ensemble, tmp_path
):
    python, names = server
    frames, num_frames = example_frames(ensemble.schema, 3, 5)
    arrays = {name: values.numpy() for name, values in frames.items()}
    expected = OnnxEnsemble(exported.path).run(arrays, num_frames.numpy())
    asked, answered = tmp_path / "asked.npz", tmp_path / "answered.npy"
    np.savez(asked, num_frames=num_frames.numpy(), **arrays)

    result = subprocess.run(
        [python, "-I", "-c", SERVE, exported.path, asked, answered],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == names
    assert {"numpy", "onnxruntime"} <= {name.removesuffix("-gpu") for name in names}
    assert not {"torch", "onnx", "pydantic", "safetensors", "click"} & set(names)
    np.testing.assert_array_equal(np.load(answered), expected.probabilities)
