import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ensemble_kit.errors import ProviderError
from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.runtime import OnnxEnsemble

ON_CPU = "Install onnxruntime-gpu with CUDA 13 and cuDNN 9, or ask for the CPU."


def arrays(schema, batch_size, length):
    frames, num_frames = example_frames(schema, batch_size, length)
    return {name: values.numpy() for name, values in frames.items()}, num_frames.numpy()


def refused(path, **options):
    with pytest.raises(ProviderError) as caught:
        OnnxEnsemble(path, **options)
    return str(caught.value)


def test_a_server_needs_no_torch_and_no_more_of_the_kit(exported):
    code = (
        "import sys, numpy as np\n"
        "from ensemble_kit.runtime import OnnxEnsemble\n"
        f"ensemble = OnnxEnsemble({str(exported.path)!r})\n"
        "frames = {'rgb': np.ones((2, 3, 7), np.uint8), 'audio': np.ones((2, 3, 3), np.uint8)}\n"
        "print(ensemble.run(frames, np.array([3, 1])).labels.shape)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}\n"
        "             & {'torch', 'onnx', 'pydantic', 'safetensors', 'click', 'google'}))\n"
        "print(sorted(name for name in sys.modules if name.startswith('ensemble_kit')))\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert result.stdout.splitlines() == [
        "(2, 6)",
        "[]",
        "['ensemble_kit', 'ensemble_kit._version', 'ensemble_kit.choices', 'ensemble_kit.draws', "
        "'ensemble_kit.errors', 'ensemble_kit.runtime', 'ensemble_kit.serving', "
        "'ensemble_kit.serving.batches', 'ensemble_kit.serving.calibration', "
        "'ensemble_kit.serving.inputs', "
        "'ensemble_kit.serving.mapping', 'ensemble_kit.serving.onnx_file', "
        "'ensemble_kit.serving.opening', 'ensemble_kit.serving.protobuf', "
        "'ensemble_kit.serving.session', 'ensemble_kit.serving.windows', 'ensemble_kit.store', "
        "'ensemble_kit.store.blocks', 'ensemble_kit.store.dtypes', 'ensemble_kit.wording']",
    ]


def test_the_session_says_what_it_runs_on_and_takes(exported):
    ensemble = OnnxEnsemble(str(exported.path))

    assert ensemble.provider == "CPUExecutionProvider"
    assert ensemble.inputs == ("rgb", "audio", "num_frames")


def test_a_file_in_blocks_is_computed_as_it_is_stored_unless_float32_is_asked_for(
    exported, exported_int4, ensemble
):
    frames, num_frames = arrays(ensemble.schema, 5, 9)
    found = {
        (computes, is_exact): OnnxEnsemble(
            exported_int4.path, computes=computes, is_exact=is_exact
        ).run(frames, num_frames).probabilities
        for computes in (None, "packed", "float32")
        for is_exact in (False, True)
    }  # fmt: skip

    assert OnnxEnsemble(exported_int4.path).computes == "packed"
    assert OnnxEnsemble(exported_int4.path, computes="float32").computes == "float32"
    assert OnnxEnsemble(exported.path).computes == "float32"
    np.testing.assert_array_equal(found[None, False], found["packed", False])
    np.testing.assert_array_equal(found["float32", True], found["float32", False])
    np.testing.assert_allclose(found["packed", True], found["float32", True], rtol=0, atol=1e-5)
    change = np.abs(found["packed", False] - found["packed", True]).max()
    assert 1e-6 < change < 0.05


def test_weights_in_blocks_stay_packed_with_low_memory(exported_int4, ensemble):
    frames, num_frames = arrays(ensemble.schema, 3, 5)
    usual = OnnxEnsemble(exported_int4.path)

    lean = OnnxEnsemble(exported_int4.path, low_memory=True)

    assert lean.computes == "packed"
    np.testing.assert_array_equal(
        lean.run(frames, num_frames).probabilities, usual.run(frames, num_frames).probabilities
    )


def test_frames_may_come_in_any_order_and_counts_in_any_integer_type(exported, ensemble):
    session = OnnxEnsemble(exported.path)
    frames, num_frames = arrays(ensemble.schema, 4, 6)
    expected = session.run(frames, num_frames)

    for counts in (num_frames.astype(np.int32), num_frames.astype(np.uint8), num_frames.tolist()):
        found = session.run(dict(reversed(frames.items())), counts)
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rgb"], "frames has ['rgb']; the file's inputs are ['audio', 'rgb']"),
        (
            ["rgb", "audio", "text"],
            "frames has ['audio', 'rgb', 'text']; the file's inputs are ['audio', 'rgb']",
        ),
        (["rgb", "sound"], "frames has ['rgb', 'sound']; the file's inputs are ['audio', 'rgb']"),
    ],
)
def test_other_modalities_are_the_callers_bug(names, message, exported):
    frames = {name: np.zeros((1, 2, 3), np.uint8) for name in names}

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        OnnxEnsemble(exported.path).run(frames, np.array([2]))

    assert str(caught.value) == message


def test_a_file_that_is_no_onnx_file_is_refused(tmp_path):
    path = tmp_path / "ensemble.onnx"
    path.write_bytes(b"garbage")

    assert refused(path) == (
        f"ONNX Runtime cannot open {path}: [ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model "
        f"from {path} failed:Protobuf parsing failed.\n"
        "Export the file again, or copy it again from where it is whole."
    )


def test_half_a_file_is_refused(exported, tmp_path):
    path = tmp_path / "ensemble.onnx"
    path.write_bytes(exported.path.read_bytes()[:400_000])

    assert refused(path).startswith(f"ONNX Runtime cannot open {path}: ")


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "ensemble.onnx"

    assert refused(path) == (
        f"ONNX Runtime cannot open {path}: [ONNXRuntimeError] : 3 : NO_SUCHFILE : Load model from "
        f"{path} failed:Load model {path} failed. File doesn't exist.\n"
        "Export the file again, or copy it again from where it is whole."
    )


def test_an_onnx_file_of_another_tool_is_refused(tmp_path):
    path = tmp_path / "other.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [value], [out]
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)

    assert refused(path) == (
        f"{path} has no metadata of ensemble-kit.\n"
        "Name a file that `ensemble-kit export-onnx` wrote."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(exported, capfd):
    message = refused(exported.path, device="cuda")

    capfd.readouterr()  # ONNX Runtime says on stderr which library it misses
    is_built_for_it = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    reason = (
        "the session got CPUExecutionProvider"
        if is_built_for_it
        else "this build of ONNX Runtime does not have it"
    )
    assert message == (
        f"ONNX Runtime cannot run {exported.path} on CUDAExecutionProvider: {reason}.\n{ON_CPU}"
    )


def test_a_build_without_cuda_is_named(exported, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])

    assert refused(exported.path, device="cuda") == (
        f"ONNX Runtime cannot run {exported.path} on CUDAExecutionProvider: this build of ONNX "
        f"Runtime does not have it.\n{ON_CPU}"
    )


def test_a_session_that_fell_back_in_silence_is_refused(exported, monkeypatch):
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *_, providers, **__: asked.append(providers) or fallen,
    )

    message = refused(exported.path, device="cuda")

    assert asked == [["CUDAExecutionProvider"]]
    assert message == (
        f"ONNX Runtime cannot run {exported.path} on CUDAExecutionProvider: the session got "
        f"CPUExecutionProvider.\n{ON_CPU}"
    )
