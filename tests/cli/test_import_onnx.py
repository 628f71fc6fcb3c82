import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import tiny_frames
from foreign_models import (
    dequantised,
    foreign_probabilities,
    foreign_weights,
    torch_probabilities,
    write_foreign,
)
from onnx import numpy_helper
from workspace_fixture import write_selection_of

from ensemble_kit.choices import OPSET
from ensemble_kit.cli import main
from ensemble_kit.data.dataset import Records
from ensemble_kit.networks.loading import load, load_fused_member
from ensemble_kit.networks.storage import round_to
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.onnx_file import read_tensors
from ensemble_kit.store.provenance import FusedMetadata
from ensemble_kit.store.selection_file import read_selection
from ensemble_kit.store.tensor_files import open_tensors

VALIDATION = "data/validate/*.tfrecord"
MAPPING = ["--input", "rgb=pixels", "--num-frames", "lengths", "--activation", "sigmoid"]
TORCH_MAPPING = ["--input", "rgb+audio=frames", "--is-frame", "mask", "--frames", "raw"]
COEFFICIENTS = {"tagger": 0.5, "vlad": 0.3, "recurrent": 0.2}


@pytest.fixture
def type_in(runner, own_workspace):
    def run(*words):
        result = runner.invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_a_foreign_model_is_predicted_selected_and_fused_like_any_other(type_in, own_workspace):
    original = write_foreign(own_workspace.path / "tagger.onnx")

    output = type_in("import-onnx", "tagger.onnx", VALIDATION, *MAPPING)
    assert output.startswith("runs/tagger/foreign.safetensors: 9,806 numbers.\n")
    assert output.splitlines()[1].startswith(
        "Its probabilities differ from those of tagger.onnx by at most "
    )
    predicted = "runs/tagger/validation.safetensors"
    type_in("predict", "runs/tagger/foreign.safetensors", VALIDATION, "-o", predicted)
    type_in("select", predicted)
    type_in("fuse", "--dtype", "fp32")

    records = Records([VALIDATION])
    found = np.concatenate([rows for _, rows in read_predictions(Path(predicted)).blocks()])
    for row, video in zip(found, records.videos(), strict=True):
        expected = foreign_probabilities(original, dequantised(video.frames["rgb"]))
        np.testing.assert_allclose(row, expected, atol=1e-5)
    (member,) = read_selection(own_workspace.path / "ensemble" / "selection.json").members
    assert (member.name, member.model.kind) == ("tagger", "foreign")
    fused = load(own_workspace.path / "ensemble" / "fused.safetensors")
    for batch in records.batches(8):
        np.testing.assert_allclose(fused.probabilities(batch), found[: len(batch.ids)], atol=1e-6)
        break
    scores = json.loads(
        type_in("evaluate", "runs/tagger/foreign.safetensors", VALIDATION, "--json")
    )
    assert scores == json.loads(type_in("evaluate", predicted, "--json"))


def exact_tagger(path, dtype):
    """Write a model whose weights a precision changes no more."""
    weights = {}
    for name, array in foreign_weights().items():
        axis = {"fc1/w": 1, "fc2/w": 0}.get(name)
        weights[name] = (
            round_to(torch.from_numpy(array), dtype, output_axis=axis).restored().numpy()
        )
    return write_foreign(path / "tagger.onnx", weights=weights)


def exact_recurrent(path, torch_model):
    """Write a model whose weights bf16 changes no more."""
    model = onnx.load(torch_model)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > 1:
            rounded = torch.from_numpy(values.copy()).bfloat16().float().numpy()
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    onnx.save(model, path / "recurrent.onnx")
    return path / "recurrent.onnx"


@pytest.mark.usefixtures("import_in_this_process")
def test_one_onnx_file_of_own_and_foreign_members_computes_what_the_originals_do(
    type_in, own_workspace, torch_model, rng
):
    tagger = exact_tagger(own_workspace.path, "int8")
    recurrent = exact_recurrent(own_workspace.path, torch_model)
    type_in("import-onnx", tagger, VALIDATION, *MAPPING)
    type_in("import-onnx", recurrent, VALIDATION, *TORCH_MAPPING)
    ensemble = own_workspace.path / "ensemble"
    files = {
        "tagger": own_workspace.path / "runs" / "tagger" / "foreign.safetensors",
        "vlad": own_workspace.averaged("vlad"),
        "recurrent": own_workspace.path / "runs" / "recurrent" / "foreign.safetensors",
    }
    (ensemble / "selection.json").unlink(missing_ok=True)
    write_selection_of(ensemble / "selection.json", files, COEFFICIENTS)

    type_in("fuse", "--dtype", "int8", "--force")
    type_in("export-onnx", "--repeats", "2", "--force")
    claims = json.loads(type_in("verify", "ensemble/ensemble.onnx", "--json"))["claims"]

    exported = OnnxEnsemble(ensemble / "ensemble.onnx", is_exact=True)
    assert {each["name"]: each["verdict"] for each in claims} == {
        "content": "holds",
        "bytes": "holds",
        "weights": "holds",
        "parity": "holds",
        "products": "holds",
        "score": "not checked",
    }
    card = (ensemble / "README.md").read_text()
    assert "| `pixels` | frames of rgb, dequantised |\n| `lengths` | `num_frames` |" in card
    assert "| its output | a sigmoid makes probabilities of it |" in card
    assert "| `frames` | frames of rgb + audio, raw |\n| `mask` | `is_frame` |" in card
    assert "| its output | probabilities as they are |" in card
    with open_tensors(ensemble / "fused.safetensors") as file:
        metadata = file.metadata_as(FusedMetadata)
        own = load_fused_member(file, metadata.members[1], metadata.data_schema)
    assert set(exported.inputs) == {"rgb", "audio", "num_frames"}
    for counts in ([1], [4, 12, 3], [7, 2]):
        frames, num_frames = tiny_frames(metadata.data_schema, counts, rng)
        with torch.inference_mode():
            expected = 0.3 * own(frames, num_frames, own.draws_for("vlad", repeats=2)).numpy()
        for row, count in enumerate(counts):
            rgb, audio = (frames[name][row, :count].numpy() for name in ("rgb", "audio"))
            expected[row] += 0.5 * foreign_probabilities(tagger, dequantised(rgb))
            joint = np.concatenate([rgb, audio], axis=1)
            expected[row] += 0.2 * torch_probabilities(recurrent, joint)
        arrays = {name: values.numpy() for name, values in frames.items()}
        found = exported.run(arrays, num_frames.numpy()).probabilities
        np.testing.assert_allclose(found, expected, atol=1e-5)
    stored = {
        tensor.name: tensor.type_name
        for tensor in read_tensors(ensemble / "ensemble.onnx")
        if tensor.name.startswith(("member_tagger.", "member_recurrent."))
    }
    # blocks of 7 numbers, of which too many would lose one to 0
    assert stored["member_tagger.weights.fc1/w"] == "BFLOAT16"
    assert stored["member_tagger.weights.fc2/w"] == "INT8"
    assert stored["member_tagger.weights.fc1/b"] == "BFLOAT16"
    assert stored["member_recurrent.weights.head.weight"] == "BFLOAT16"
    nodes = {node.name for node in onnx.load(ensemble / "ensemble.onnx").graph.node}
    assert {"tagger/fc1/MatMul", "tagger/MatMul", "tagger/Relu", "mixture/TopK"} <= nodes


@pytest.mark.usefixtures("import_in_this_process")
def test_a_foreign_member_in_int4_is_computed_from_packed_numbers(type_in, own_workspace, rng):
    tagger = exact_tagger(own_workspace.path, "int4")
    type_in("import-onnx", tagger, VALIDATION, *MAPPING)
    ensemble = own_workspace.path / "ensemble"
    (ensemble / "selection.json").unlink(missing_ok=True)
    files = {"tagger": own_workspace.path / "runs" / "tagger" / "foreign.safetensors"}
    write_selection_of(ensemble / "selection.json", files, {"tagger": 1.0})

    type_in("fuse", "--dtype", "int4", "--force")
    type_in("export-onnx", "--force")

    assert json.loads(type_in("verify", "ensemble/ensemble.onnx", "--json"))["holds"]
    path = ensemble / "ensemble.onnx"
    types = {tensor.name: tensor.type_name for tensor in read_tensors(path)}
    assert types["member_tagger.weights.fc2/w"] == "INT4"
    shares = read_metadata(path).proof.shares
    assert shares.converted_in_every_run == 0 < shares.as_stored
    frames, num_frames = tiny_frames(Records([VALIDATION]).schema, [4, 12, 3], rng)
    arrays = {name: values.numpy() for name, values in frames.items()}
    found = OnnxEnsemble(path, is_exact=True).run(arrays, num_frames.numpy()).probabilities
    for row, count in enumerate(num_frames.tolist()):
        expected = foreign_probabilities(tagger, dequantised(arrays["rgb"][row, :count]))
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


@pytest.mark.usefixtures("import_in_this_process")
def test_float_inputs_and_newer_operators_compute_the_same(
    type_in, runner, own_workspace, torch_model, rng
):
    opset = OPSET + 2
    ensemble = own_workspace.path / "ensemble"
    newer = own_workspace.path / "newer.onnx"
    onnx.save(onnx.version_converter.convert_version(onnx.load(torch_model), opset), newer)
    type_in("import-onnx", newer, VALIDATION, *TORCH_MAPPING)
    files = {
        "mean": own_workspace.averaged("mean"),
        "newer": own_workspace.path / "runs" / "newer" / "foreign.safetensors",
    }
    write_selection_of(ensemble / "selection.json", files, {"mean": 0.75, "newer": 0.25})
    type_in("fuse")

    refused = runner.invoke(main, ["export-onnx", "--opset", str(OPSET)])
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: The graph of newer is in operator set {opset}; --opset {OPSET} is older.\n"
        "Leave --opset out, or import newer again from an older file.\n"
    )
    assert not (ensemble / "ensemble.onnx").exists()
    found = {}
    for input_type in ("uint8", "float32"):
        output = f"ensemble/{input_type}.onnx"
        type_in("export-onnx", "-o", output, "--input", input_type)
        assert json.loads(type_in("verify", output, "--json"))["holds"]
        found[input_type] = OnnxEnsemble(own_workspace.path / output)
    imports = onnx.load(ensemble / "float32.onnx", load_external_data=False).opset_import
    schema = Records([VALIDATION]).schema
    frames, num_frames = tiny_frames(schema, [4, 12, 1], rng)
    stored = {name: values.numpy() for name, values in frames.items()}
    fractions = {name: dequantised(values) for name, values in stored.items()}

    assert [each.version for each in imports if not each.domain] == [opset]
    np.testing.assert_allclose(
        found["float32"].run(fractions, num_frames.numpy()).probabilities,
        found["uint8"].run(stored, num_frames.numpy()).probabilities,
        atol=1e-6,
    )


def test_what_is_not_mapped_is_an_error_and_nothing_is_there(runner, own_workspace):
    write_foreign(own_workspace.path / "tagger.onnx")

    result = runner.invoke(main, ["import-onnx", "tagger.onnx", VALIDATION, *MAPPING[:2]])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: tagger.onnx: nothing is mapped to its input lengths.\n"
        "Add --input MODALITY=lengths, --num-frames lengths or --is-frame lengths.\n"
    )
    assert not (own_workspace.path / "runs" / "tagger").exists()


@pytest.mark.parametrize("text", ["frames", "=frames", "rgb="])
def test_an_input_takes_a_modality_and_a_name(text, runner, own_workspace):
    write_foreign(own_workspace.path / "tagger.onnx")

    result = runner.invoke(main, ["import-onnx", "tagger.onnx", VALIDATION, "--input", text])

    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: --input takes a modality and an input: --input rgb=frames.\n"
    )
