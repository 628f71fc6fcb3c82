"""The example for ONNX Runtime in JavaScript, on a file in int4."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ensemble_kit.runtime import OnnxEnsemble

EXAMPLE = Path(__file__).parents[1] / "examples" / "javascript"
WAYS = {"onnxruntime-node": [], "onnxruntime-web": ["--wasm"]}


@pytest.mark.parametrize("package", WAYS)
def test_javascript_tags_as_python_does(package, exported_int4, ensemble, tmp_path, monkeypatch):
    if not shutil.which("node") or not (EXAMPLE / "node_modules" / package).is_dir():
        pytest.skip(f"{package} is not there: npm install --ignore-scripts in {EXAMPLE}")
    monkeypatch.setenv("ACCURACY_LEVEL", "1")
    random = np.random.default_rng(0)
    video = {
        modality.name: random.integers(0, 256, (5, modality.width), dtype=np.uint8)
        for modality in ensemble.schema.modalities
    }
    (tmp_path / "video.json").write_text(json.dumps({k: v.tolist() for k, v in video.items()}))

    result = subprocess.run(
        ["node", EXAMPLE / "tag.mjs", exported_int4.path, tmp_path / "video.json", *WAYS[package]],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip

    tags = json.loads(result.stdout)
    frames = {name: values[None] for name, values in video.items()}
    expected = OnnxEnsemble(exported_int4.path, is_exact=True).run(frames, np.array([5]))
    np.testing.assert_allclose(tags["probabilities"], expected.probabilities[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(tags["confidences"], expected.confidences[0], rtol=0, atol=1e-5)
    assert tags["labels"] == expected.labels[0].tolist()
