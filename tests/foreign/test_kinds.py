"""Kinds of foreign models: layouts, masks, tables, quantised graphs, classical models."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders import contents_of
from foreign_kinds import (
    CLASSES,
    HEAD,
    LAST_FRAME,
    MEAN,
    SCHEMA,
    TRANSPOSED,
    WIDTH,
    batch_of,
    classical_model,
    labelwise_model,
    originals,
    weights,
)
from foreign_models import dequantised, parsed_model, sigmoid
from onnx import numpy_helper

from ensemble_kit import import_onnx
from ensemble_kit.errors import ForeignModelError
from ensemble_kit.networks.loading import load

pytestmark = pytest.mark.usefixtures("import_in_this_process")


@pytest.fixture
def write(tmp_path):
    def write(inputs, body, *, values=None, opset=17, output="float[b, 3] p", extra_opsets=""):
        model = parsed_model(inputs, body, values or weights(), opset, output, extra_opsets)
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


@pytest.fixture
def bring(tmp_path):
    def bring(path, *, schema=SCHEMA, **options):
        options = {"inputs": {"rgb": "x"}, "num_frames": "n", "frames": "dequantised", **options}
        output = tmp_path / "foreign.safetensors"
        return import_onnx(path, output, schema=schema, name="m", force=True, **options).path

    return bring


@pytest.fixture
def message_of(bring):
    def message_of(path, **options):
        with pytest.raises(ForeignModelError) as caught:
            bring(path, **options)
        return str(caught.value)

    return message_of


def assert_mean(path, rng, *, scale=1.0):
    """Compare a model of the mean of frames with NumPy, video by video."""
    batch = batch_of([3, 9, 1], rng)
    found = load(path).probabilities(batch)
    for row, count in enumerate(batch.num_frames):
        mean = dequantised(batch.frames["rgb"][row, :count]).mean(axis=0)
        np.testing.assert_allclose(found[row], sigmoid(scale * mean @ weights()["w"]), atol=1e-5)


def test_features_before_frames_are_refused_unless_it_is_said(write, bring, message_of, rng):
    path = write(f"float[b, {WIDTH}, t] xt, int64[b] n", TRANSPOSED)

    assert message_of(path, inputs={"rgb": "xt"}) == (
        f"{path}: the input xt is (?, 4, ?), and rgb has 4 features per frame, so that its second "
        "dimension (4) may count features rather than frames, and its third (?) frames.\n"
        "Use --input rgb=xt:channels-first if features come before frames, or rgb=xt:frames-first "
        "if they come after."
    )
    assert_mean(bring(path, inputs={"rgb": "xt:channels-first"}), rng)


def test_as_many_frames_as_features_may_be_either(write, bring, message_of, rng):
    path = write(f"float[b, {WIDTH}, {WIDTH}] x, int64[b] n", MEAN + HEAD)

    assert message_of(path).startswith(
        f"{path}: the input x is (?, 4, 4), and rgb has 4 features per frame, so that its second "
        "dimension (4) may count features rather than frames, and its third (4) frames.\n"
    )
    bring(path, inputs={"rgb": "x:frames-first"})
    bring(path, inputs={"rgb": "x:channels-first"})


def test_a_fixed_number_of_frames_after_the_features_is_named_once(write, message_of):
    path = write(f"float[b, {WIDTH}, 9] xt, int64[b] n", TRANSPOSED)

    assert message_of(path, inputs={"rgb": "xt"}) == (
        f"{path}: the input xt is (?, 4, 9), and rgb has 4 features per frame, so that its second "
        "dimension (4) may count features rather than frames, and its third (9) frames.\n"
        "Use --input rgb=xt:channels-first if features come before frames."
    )


def test_free_dimensions_are_decided_by_running_the_graph(write, bring, message_of, rng):
    path = write("float[b, s, t] x, int64[b] n", MEAN + HEAD)
    assert_mean(bring(path), rng)

    path = write("float[b, s, t] xt, int64[b] n", TRANSPOSED)
    assert "--input MODALITY=INPUT:channels-first" in message_of(path, inputs={"rgb": "xt"})
    assert_mean(bring(path, inputs={"rgb": "xt:channels-first"}), rng)


def test_videos_in_the_second_dimension_are_refused(write, message_of):
    body = "x = Transpose <perm = [1, 0, 2]> (xt)\n" + MEAN + HEAD
    path = write(f"float[t, b, {WIDTH}] xt, int64[b] n", body)

    message = message_of(path, inputs={"rgb": "xt"})

    assert message.startswith(f"{path}: ")
    assert "3 videos of 7 frames" in message


def test_a_table_of_positions_shorter_than_the_videos_is_refused_with_their_length(
    write, bring, message_of, rng
):
    body = """
       shape = Shape <start = 1, end = 2> (x)
       zero = Constant <value_ints = [0]> ()
       rows = Slice (table, zero, shape, zero)
       x1 = Add (x, rows)
       t = Squeeze (shape)
       zero0 = Constant <value_int = 0> ()
       one0 = Constant <value_int = 1> ()
       steps = Range (zero0, t, one0)
       one = Constant <value_ints = [1]> ()
       two = Constant <value_ints = [2]> ()
       column = Unsqueeze (n, one)
       less = Less (steps, column)
       mask = Cast <to = 1> (less)
       mask3 = Unsqueeze (mask, two)
       xm = Mul (x1, mask3)
       sum = ReduceSum <keepdims = 0> (xm, one)
       counts = Cast <to = 1> (column)
       pooled = Div (sum, counts)
    """
    table = np.random.default_rng(1).standard_normal((20, WIDTH)).astype(np.float32)
    path = write(
        f"float[b, t, {WIDTH}] x, int64[b] n", body + HEAD, values={**weights(), "table": table}
    )

    message = message_of(path, schema=SCHEMA.model_copy(update={"max_frames": 21}))

    assert message.startswith(f"{path}: ONNX Runtime cannot run it on 2 videos of 21 frames: ")
    assert message.endswith("\nExport the model for videos of 21 frames; it ran on 11.")
    brought = bring(path, schema=SCHEMA.model_copy(update={"max_frames": 20}))
    with pytest.raises(ForeignModelError) as caught:
        load(brought).probabilities(batch_of([24, 3], rng))
    assert str(caught.value).startswith("m: ONNX Runtime cannot run it on 2 videos of 24 frames: ")
    assert str(caught.value).endswith(
        "\nImport the model again from records with videos as long as these."
    )


@pytest.mark.parametrize(
    "table",
    [
        np.arange(300),
        np.arange(300) / 2,
        np.linspace(0, 1, 300),
        np.linspace(7, -3, 300),
    ],
)
def test_tables_of_whole_or_evenly_spaced_numbers_are_no_weights_and_never_rounded(
    table, write, bring
):
    table = table.astype(np.float32)
    values = {**weights(), "table": table, "bias": np.zeros(CLASSES, np.float32)}
    body = LAST_FRAME + "\n h0 = MatMul (pooled, w)\n h = Add (h0, bias)\n p = Sigmoid (h)\n"
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", body, values=values)

    tensors = contents_of(bring(path))

    assert tensors.keys() == {"graph", "weights.w", "weights.bias"}
    graph = onnx.ModelProto.FromString(tensors["graph"].numpy().tobytes())
    (held,) = [each for each in graph.graph.initializer if each.name == "table"]
    np.testing.assert_array_equal(numpy_helper.to_array(held), table)


@pytest.mark.parametrize(
    "table", [np.full(300, 0.5), np.sin(np.arange(300)), np.arange(300.0) ** 1.01]
)
def test_numbers_that_are_few_or_not_evenly_spaced_are_weights(table, write, bring):
    body = LAST_FRAME + "\n h0 = MatMul (pooled, w)\n h = Add (h0, bias)\n p = Sigmoid (h)\n"
    bias = np.array([0.5, 1.0, 1.5], np.float32)
    values = {**weights(), "table": table.astype(np.float32), "bias": bias}
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", body, values=values)

    assert {"weights.table", "weights.bias"} <= contents_of(bring(path)).keys()


def test_sizes_below_one_are_free(write, bring, rng):
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", MEAN + HEAD)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = -1
    onnx.save(model, path)

    brought = bring(path)

    assert_mean(brought, rng)
    graph = onnx.ModelProto.FromString(contents_of(brought)["graph"].numpy().tobytes())
    sizes = [
        size.dim_value
        for value in (*graph.graph.input, *graph.graph.output)
        for size in value.type.tensor_type.shape.dim
    ]
    assert min(sizes) == 0


MASKED = """
   one = Constant <value_ints = [1]> ()
   xm = Mul (x, mask)
   sum = ReduceSum <keepdims = 0> (xm, one)
   counts = ReduceSum <keepdims = 0> (mask, one)
   pooled = Div (sum, counts)
"""


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ("[b, t, 1]", "mask = Cast <to = 1> (m)\n"),
        (
            "[b, 1, 1, t]",
            "shape = Constant <value_ints = [0, -1, 1]> ()\n m1 = Reshape (m, shape)\n"
            "mask = Cast <to = 1> (m1)\n",
        ),
        (
            "[b, 1, t]",
            "m1 = Transpose <perm = [0, 2, 1]> (m)\n mask = Cast <to = 1> (m1)\n",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_may_have_dimensions_of_size_one(shape, body, kind, write, bring, rng):
    path = write(f"float[b, t, {WIDTH}] x, {kind}{shape} m", body + MASKED + HEAD)

    assert_mean(bring(path, num_frames=None, is_frame="m"), rng)


def test_a_mask_of_two_free_dimensions_is_refused(write, message_of):
    body = "mask = Cast <to = 1> (m)\n" + MASKED + HEAD
    path = write(f"float[b, t, {WIDTH}] x, bool[b, t, u] m", body)

    assert message_of(path, num_frames=None, is_frame="m") == (
        f"{path}: the input m is (?, ?, ?); is_frame must be (videos, frames), with or without "
        "dimensions of size 1.\n"
        "Map another input, or export the model with such an input."
    )


def test_one_modality_may_feed_two_inputs(write, bring, rng):
    path = write(
        f"float[b, t, {WIDTH}] xa, float[b, t, {WIDTH}] xb, int64[b] n",
        "x = Add (xa, xb)\n" + MEAN + HEAD,
    )

    assert_mean(bring(path, inputs={"rgb": ["xa", "xb"]}), rng, scale=2.0)


@pytest.mark.parametrize(
    ("options", "problem", "hint"),
    [
        (
            {"inputs": {"rgb": "x", "audio": "x"}},
            "its input x is mapped twice, to rgb (frames-first) and to audio (frames-first).",
            "Map it once. For frames side by side use --input rgb+audio=x.",
        ),
        (
            {"inputs": {"rgb": ["x", "x:channels-first"]}},
            "its input x is mapped twice, to rgb (frames-first) and to rgb (channels-first).",
            "Map it once.",
        ),
        (
            {"inputs": {"rgb": "x", "audio": "n"}},
            "its input n is mapped twice, to audio (frames-first) and to num_frames.",
            "Map it once.",
        ),
        (
            {"is_frame": "n"},
            "its input n is mapped twice, to num_frames and to is_frame.",
            "Map it once.",
        ),
    ],
)
def test_one_input_is_mapped_once(options, problem, hint, write, message_of):
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", MEAN + HEAD)

    assert message_of(path, **options) == f"{path}: {problem}\n{hint}"


@pytest.mark.parametrize("opset", [9, 11, 17])
def test_frames_may_be_resized_by_fractions(opset, write, bring, rng):
    upsampled = {
        9: "up = Upsample <mode = 'nearest'> (x4, scales)\n",
        11: "up = Resize <mode = 'nearest'> (x4, roi, scales)\n",
        17: "up = Resize <mode = 'nearest'> (x4, , scales)\n",
    }[opset].replace("'", '"')
    body = (
        "x4 = Unsqueeze <axes = [1]> (x)\n" + upsampled + "x1 = Squeeze <axes = [1]> (up)\n"
        "sum = ReduceSum <keepdims = 0, axes = [1]> (x1)\n"
        "counts = Cast <to = 1> (n)\n column = Unsqueeze <axes = [1]> (counts)\n"
        "pooled = Div (sum, column)\n" + HEAD
    )
    if opset == 17:
        body = (
            "one = Constant <value_ints = [1]> ()\n x4 = Unsqueeze (x, one)\n"
            + upsampled
            + "x1 = Squeeze (up, one)\n sum = ReduceSum <keepdims = 0> (x1, one)\n"
            "counts = Cast <to = 1> (n)\n column = Unsqueeze (counts, one)\n"
            "pooled = Div (sum, column)\n" + HEAD
        )
    values = {**weights(), "scales": np.array([1, 1, 2, 1], np.float32)}
    if opset == 11:
        values["roi"] = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32)
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", body, values=values, opset=opset)

    assert_mean(bring(path), rng, scale=2.0)


def test_inputs_in_bfloat16_are_fed(write, bring, rng):
    body = "x = Cast <to = 1> (xb)\n" + MEAN + HEAD
    path = write(f"bfloat16[b, t, {WIDTH}] xb, int64[b] n", body)
    batch = batch_of([3, 9, 1], rng)

    found = load(bring(path, inputs={"rgb": "xb"})).probabilities(batch)

    for row, count in enumerate(batch.num_frames):
        frames = torch.from_numpy(dequantised(batch.frames["rgb"][row, :count]))
        mean = frames.bfloat16().float().mean(dim=0).numpy()
        np.testing.assert_allclose(found[row], sigmoid(mean @ weights()["w"]), atol=1e-5)


def test_a_batch_norm_in_training_mode_is_named(write, message_of):
    body = (
        MEAN
        + """
       h0 = MatMul (pooled, w)
       h, m1, v1 = BatchNormalization <training_mode = 1> (h0, s, z, z, s)
       p = Sigmoid (h)
    """
    )
    values = {**weights(), "s": np.ones(CLASSES, np.float32), "z": np.zeros(CLASSES, np.float32)}
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", body, values=values)

    assert message_of(path) == (
        f"{path} has BatchNormalization in training mode, so that a video's probabilities depend "
        "on the other videos of its batch.\nExport the model in its evaluation mode."
    )


def test_dynamic_quantisation_is_named(write, message_of):
    body = (
        MEAN
        + """
       q, s, z = DynamicQuantizeLinear (pooled)
       h0 = DequantizeLinear (q, s, z)
       h = MatMul (h0, w)
       p = Sigmoid (h)
    """
    )
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", body)

    problem, hint = message_of(path).split("\n")

    assert problem.startswith(f"{path}: the probabilities of a video change by 0.0")
    assert problem.endswith(
        " with what else is in its batch, because DynamicQuantizeLinear scales all of it together."
    )
    assert hint == "Use a model that is not quantised dynamically; fuse can store it in int8."


def test_what_joins_the_videos_of_a_batch_is_not_blamed_on_padding(write, message_of):
    body = (
        MEAN
        + """
       zero = Constant <value_ints = [0]> ()
       all = ReduceMean <axes = [0], keepdims = 1> (pooled)
       centred = Sub (pooled, all)
       h = MatMul (centred, w)
       p = Sigmoid (h)
    """
    )
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", body)

    problem, hint = message_of(path).split("\n")

    assert problem.endswith(" when other videos are in its batch.")
    assert hint == ("Export the model in its evaluation mode, without operators that join videos.")


@pytest.mark.parametrize("has_zipmap", [True, False])
def test_a_linear_classifier_is_a_member(has_zipmap, tmp_path, bring, message_of, rng):
    path = classical_model(tmp_path / "m.onnx", has_zipmap=has_zipmap)
    output = "zm" if has_zipmap else "raw"

    assert message_of(path) == (
        f"{path} has 2 outputs: lab, {output}.\n"
        "Say with --probabilities which of them has a number for each class."
    )
    assert message_of(path, probabilities="lab") == (
        f"{path}: its output lab holds INT64, but probabilities are fractions.\n"
        f"Use --probabilities with another output: {output}."
    )
    assert_mean(bring(path, probabilities=output), rng)


@pytest.mark.parametrize("form", ["tensor", "zipmap", "sequence"])
def test_a_classifier_of_several_labels_is_a_member_of_their_positives(form, tmp_path, bring, rng):
    path = labelwise_model(tmp_path / "m.onnx", form)

    assert_mean(bring(path, probabilities="out"), rng)


def test_labels_of_more_than_two_classes_are_refused(tmp_path, message_of):
    shaped = labelwise_model(tmp_path / "m.onnx", "tensor", columns=3)
    assert message_of(shaped, probabilities="out").startswith(
        f"{shaped}: its output out has shape (3, 1, 3) for 1 video of 1 frame and 3 classes; "
    )
    sequence = labelwise_model(tmp_path / "m.onnx", "sequence", columns=3)
    assert message_of(sequence, probabilities="out") == (
        f"{sequence}: its output out is a list or a dictionary, not a tensor.\n"
        "Export the model with an output that has a number for each class of a video."
    )


def test_trees_are_a_member_whose_numbers_stay_as_they_are(tmp_path, bring, rng):
    path = classical_model(tmp_path / "m.onnx", has_zipmap=False, kind="trees")
    batch = batch_of([3, 9, 1], rng)

    brought = bring(path, probabilities="raw")

    assert contents_of(brought).keys() == {"graph"}
    found = load(brought).probabilities(batch)
    for row, count in enumerate(batch.num_frames):
        mean = dequantised(batch.frames["rgb"][row, :count]).mean(axis=0)
        leaves = np.where(mean[:CLASSES] <= 0, -1.0, 1.0 + np.arange(CLASSES))
        np.testing.assert_allclose(found[row], sigmoid(leaves), atol=1e-5)


def test_the_scales_of_a_quantised_graph_stay_exact(write, bring, rng):
    matrix = weights()["w"]
    scale = (np.abs(matrix).max(axis=0) / 127).astype(np.float32)
    values = {"codes": np.rint(matrix / scale).astype(np.int8), "scale": scale}
    body = MEAN + "w = DequantizeLinear <axis = 1> (codes, scale)\n" + HEAD
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", body, values=values)
    batch = batch_of([3, 9, 1], rng)

    brought = bring(path)

    assert contents_of(brought).keys() == {"graph"}
    found = load(brought).probabilities(batch)
    np.testing.assert_allclose(found, originals(path, batch), atol=1e-5)


def test_the_model_that_is_proved_is_the_one_that_was_read(write, bring, monkeypatch):
    path = write(f"float[b, t, {WIDTH}] x, int64[b] n", MEAN + HEAD)
    other = weights(1)
    opened = []

    def replace_the_file_first(model, *args, **options):
        write(f"float[b, t, {WIDTH}] x, int64[b] n", MEAN + HEAD, values=other)
        opened.append(model)
        return session(model, *args, **options)

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", replace_the_file_first)

    tensors = contents_of(bring(path))

    np.testing.assert_array_equal(tensors["weights.w"].numpy(), weights()["w"])
    assert all(isinstance(model, bytes) for model in opened)


def test_float_tables_beside_the_file_are_kept_in_the_graph(write, tmp_path, bring, rng):
    table = np.arange(300, dtype=np.float32)
    path = write(
        f"float[b, t, {WIDTH}] x, int64[b] n",
        LAST_FRAME + HEAD,
        values={**weights(), "table": table},
    )
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    batch = batch_of([3, 9, 1], rng)
    expected = originals(path, batch)

    brought = bring(path)
    (tmp_path / "m.data").unlink()

    np.testing.assert_allclose(load(brought).probabilities(batch), expected, atol=1e-5)
