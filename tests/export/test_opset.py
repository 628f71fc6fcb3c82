"""Files in an older operator set, which has no packed products and no type of four bits."""

import numpy as np
import onnx
import pytest
import torch
from builders import tiny_recipe, tiny_schema, write_checkpoint
from workspace_fixture import write_selection_of

from ensemble_kit.export import export_onnx
from ensemble_kit.fusion.stage import fuse
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.onnx_file import read_tensors
from ensemble_kit.store.blocks import SCALE
from ensemble_kit.verification import verify

ODD = 67  # 67 x 67 numbers: the last byte holds one of four bits, and no whole number of blocks


@pytest.fixture(scope="module", params=["int8", "int4"])
def files(request, tmp_path_factory):
    """A file in blocks in operator sets 20 and 21, by the set."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = [f"pooling.hidden_size={ODD}", f"hidden.size={ODD}"]
    recipe = tiny_recipe(pooling="gru", overrides=sizes)
    schema = tiny_schema(widths={"rgb": 64})
    write_checkpoint(folder / "one.safetensors", recipe, schema, seed=4)
    selection = write_selection_of(
        folder / "selection.json", {"one": folder / "one.safetensors"}, {"one": 1.0}
    )
    fused = fuse(selection, folder / "fused.safetensors", dtype=request.param).path
    return {opset: export_onnx(fused, folder / f"{opset}.onnx", opset=opset) for opset in (20, 21)}


def test_an_older_set_computes_the_same_from_numbers_converted_once(files, rng):
    frames = {"rgb": torch.randn(3, 5, 64, generator=rng).numpy()}
    older = OnnxEnsemble(files[20].path)
    newer = OnnxEnsemble(files[21].path, is_exact=True)

    found, expected = (each.run(frames, np.array([5, 2, 0])) for each in (older, newer))

    assert (older.computes, newer.computes) == ("float32", "packed")
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)
    proof = files[20].proof
    assert proof.exact_difference <= 1e-5
    assert proof.shipped_difference is None
    shares = proof.shares
    assert (shares.as_stored, shares.converted_in_every_run) == (0, 0)
    assert shares.converted_once > 3 * ODD**2


def test_it_stores_the_same_bytes(files):
    models = {opset: onnx.load(exported.path) for opset, exported in files.items()}
    values = {
        opset: {each.name: each.raw_data for each in model.graph.initializer if each.raw_data}
        for opset, model in models.items()
    }
    weights = {name: raw for name, raw in values[21].items() if name.startswith("member_")}

    assert any(name.endswith(SCALE) for name in weights)
    for name, raw in weights.items():
        assert values[20][name] == raw
    assert [each.version for each in models[20].opset_import if not each.domain] == [20]
    assert models[20].ir_version == 9  # that of ONNX 1.15, which brought operator set 20
    types = {tensor.type_name for tensor in read_tensors(files[20].path)}
    assert "INT4" not in types
    assert read_metadata(files[20].path).opset == 20


def test_it_holds_what_it_claims(files):
    assert {claim.verdict for claim in verify(files[20].path)} <= {"holds", "not checked"}
