"""Foreign members of several kinds in one fused file and one ONNX file."""

import numpy as np
import onnx
import pytest
import torch
from foreign_kinds import (
    CLASSES,
    HEAD,
    LAST_FRAME,
    SCHEMA,
    TRANSPOSED,
    WIDTH,
    classical_model,
    weights,
)
from foreign_models import dequantised, parsed_model, sigmoid
from plain_session import NOTHING, REFUSED, plain_answers
from workspace_fixture import write_selection_of

from ensemble_kit import export_onnx, fuse, import_onnx
from ensemble_kit.errors import ProviderError
from ensemble_kit.foreign import stage
from ensemble_kit.foreign.conversion import convert
from ensemble_kit.networks.fused_member import model_metadata
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.verification import verify

RECURRENT = """
   counts = Cast <to = 6> (n)
   steps = Transpose <perm = [1, 0, 2]> (x)
   states, state = RNN <hidden_size = 4> (steps, into, within, , counts)
   zero = Constant <value_ints = [0]> ()
   pooled = Squeeze (state, zero)
"""
COEFFICIENTS = {"classical": 0.5, "last": 0.25, "transposed": 0.25}


def exact():
    """Return weights that bfloat16 holds exactly."""
    return {"w": torch.from_numpy(weights()["w"]).bfloat16().float().numpy()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    inputs = f"float[b, t, {WIDTH}] x, int64[b] n"
    table = {"table": np.arange(300, dtype=np.float32)}
    models = {
        "last": parsed_model(inputs, LAST_FRAME + HEAD, exact() | table, 17, "float[b, 3] p"),
        "transposed": parsed_model(
            f"float[b, {WIDTH}, t] xt, int64[b] n", TRANSPOSED, exact(), 17, "float[b, 3] p"
        ),
    }
    classical_model(folder / "classical.onnx", has_zipmap=True)
    options = {"classical": {"probabilities": "zm"}, "last": {}, "transposed": {}}
    files = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "convert_in_child", convert)
        for name, chosen in options.items():
            path = folder / f"{name}.onnx"
            if name in models:
                path.write_bytes(models[name].SerializeToString())
            files[name] = import_onnx(
                path,
                folder / f"{name}.safetensors",
                schema=SCHEMA,
                name=name,
                inputs={"rgb": "xt:channels-first" if name == "transposed" else "x"},
                num_frames="n",
                **chosen,
            ).path
    write_selection_of(folder / "selection.json", files, COEFFICIENTS)
    fuse(folder / "selection.json", folder / "fused.safetensors", dtype="bf16")
    export_onnx(folder / "fused.safetensors", folder / "ensemble.onnx")
    return folder / "ensemble.onnx"


def test_what_members_are_counted_at_is_what_the_fused_file_takes(exported):
    counted = 0
    for name in COEFFICIENTS:
        with open_tensors(exported.with_name(f"{name}.safetensors")) as file:
            model = model_metadata(file, exported.parent, repeats=1)
        counted += model.bytes_by_dtype["bf16"]

    size = exported.with_name("fused.safetensors").stat().st_size
    assert counted + model.shared_bytes == size


def expected_of(frames):
    """Return what all members together say of one video, ``(T, 4)``."""
    of_mean, of_last = (
        [sigmoid(row @ matrix) for matrix in (weights()["w"], exact()["w"])]
        for row in (frames.mean(axis=0), frames[-1])
    )
    return 0.5 * of_mean[0] + 0.25 * of_mean[1] + 0.25 * of_last[1]


def test_the_exported_file_computes_what_the_originals_do(exported):
    random = np.random.default_rng(3)
    counts = np.array([300, 257, 1, 9])  # 257 is a whole number that bfloat16 does not hold
    stored = {
        name: random.integers(0, 256, (4, 300, width)).astype(np.uint8)
        for name, width in SCHEMA.widths.items()
    }

    found = OnnxEnsemble(exported).run(stored, counts).probabilities

    for row, count in enumerate(counts):
        frames = dequantised(stored["rgb"][row, :count])
        np.testing.assert_allclose(found[row], expected_of(frames), atol=1e-5)
    claims = {claim.name: claim.verdict for claim in verify(exported)}
    assert claims["parity"] == claims["content"] == "holds"


def test_a_video_longer_than_a_members_table_is_an_error(exported):
    stored = {name: np.zeros((1, 301, width), np.uint8) for name, width in SCHEMA.widths.items()}

    with pytest.raises(ProviderError) as caught:
        OnnxEnsemble(exported).run(stored, np.array([301]))

    assert str(caught.value).startswith(f"ONNX Runtime cannot run {exported} on 1 video: ")


@pytest.mark.usefixtures("import_in_this_process")
def test_a_recurrent_member_refuses_no_videos_and_no_frames(tmp_path):
    matrices = {"into": np.eye(WIDTH, dtype=np.float32)[None], "within": np.ones((1, 4, 4), "f4")}
    inputs = f"float[b, t, {WIDTH}] x, int64[b] n"
    model = parsed_model(inputs, RECURRENT + HEAD, exact() | matrices, 17, "float[b, 3] p")
    (tmp_path / "rnn.onnx").write_bytes(model.SerializeToString())
    options = {"schema": SCHEMA, "name": "rnn", "inputs": {"rgb": "x"}, "num_frames": "n"}
    member = import_onnx(tmp_path / "rnn.onnx", tmp_path / "rnn.safetensors", **options)
    write_selection_of(tmp_path / "selection.json", {"rnn": member.path}, {"rnn": 1.0})
    fuse(tmp_path / "selection.json", tmp_path / "fused.safetensors")
    exported = export_onnx(tmp_path / "fused.safetensors", tmp_path / "ensemble.onnx").path

    assert plain_answers(exported, [*NOTHING, [2, 2, 3]]) == [REFUSED] * 5 + ["ran (2, 3)"]


@pytest.mark.usefixtures("import_in_this_process")
def test_rounding_that_only_late_frames_show_is_seen_without_records(tmp_path):
    # halves below 128 are the same in bfloat16, so 12 frames show nothing
    table = {"table": np.arange(300, dtype=np.float32) + 0.5}
    table["table"][0] = 0.25  # evenly spaced numbers are never rounded
    body = LAST_FRAME.replace("value_float = 1.0", "value_float = 0.5") + HEAD
    inputs = f"float[b, t, {WIDTH}] x, int64[b] n"
    model = parsed_model(inputs, body, exact() | table, 17, "float[b, 3] p")
    (tmp_path / "halves.onnx").write_bytes(model.SerializeToString())
    options = {"schema": SCHEMA, "name": "halves", "inputs": {"rgb": "x"}, "num_frames": "n"}
    member = import_onnx(tmp_path / "halves.onnx", tmp_path / "halves.safetensors", **options)
    write_selection_of(tmp_path / "selection.json", {"halves": member.path}, {"halves": 1.0})

    fused = fuse(tmp_path / "selection.json", tmp_path / "fused.safetensors", dtype="bf16")

    assert fused.loss.worst_change > 0.1
    claims = {claim.name: claim for claim in verify(fused.path)}
    assert claims["parity"].finding.endswith(
        f"changes a probability of made-up videos by {fused.loss.worst_change:.4f} at most"
    )


def test_a_file_of_trees_alone_computes_what_they_do_and_holds_its_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "convert_in_child", convert)
    files = {}
    for name, output in (("tensor", "raw"), ("zipmap", "zm")):
        path = classical_model(tmp_path / f"{name}.onnx", has_zipmap=output == "zm", kind="trees")
        model = onnx.load(path)  # converters name nodes like the operators that the kit adds
        names = ("Add", "Slice", "Cast", "Mul", "Add_2")
        for node, other in zip(model.graph.node, names, strict=False):
            node.name = other
        onnx.save(model, path)
        files[name] = import_onnx(
            path, tmp_path / f"{name}.safetensors", schema=SCHEMA, name=name, inputs={"rgb": "x"},
            num_frames="n", probabilities=output,
        ).path  # fmt: skip
    write_selection_of(tmp_path / "selection.json", files, {"tensor": 0.75, "zipmap": 0.25})
    counts = np.array([9, 1, 4])
    random = np.random.default_rng(5)
    stored = {
        name: random.integers(0, 256, (3, 9, width)).astype(np.uint8)
        for name, width in SCHEMA.widths.items()
    }

    fused = fuse(tmp_path / "selection.json", tmp_path / "fused.safetensors", dtype="int4")
    exported = export_onnx(fused.path, tmp_path / "ensemble.onnx").path

    assert fused.loss.worst_change == 0  # thresholds and leaves are no weights
    found = OnnxEnsemble(exported).run(stored, counts).probabilities
    for row, count in enumerate(counts):
        mean = dequantised(stored["rgb"][row, :count]).mean(axis=0)
        leaves = np.where(mean[:CLASSES] <= 0, -1.0, 1.0 + np.arange(CLASSES))
        np.testing.assert_allclose(found[row], sigmoid(leaves), atol=1e-6)
    for file in (fused.path, exported):
        assert {claim.verdict for claim in verify(file)} <= {"holds", "not checked"}
        assert {claim.name: claim.verdict for claim in verify(file)}["parity"] == "holds"
