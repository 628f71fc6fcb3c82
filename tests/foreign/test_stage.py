import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from builders import contents_of, interrupt_the_writing, tiny_frames, tiny_schema
from foreign_models import (
    CLASSES,
    HIDDEN,
    WIDTH,
    dequantised,
    foreign_model,
    foreign_probabilities,
    foreign_weights,
    run_original,
    sigmoid,
    torch_probabilities,
    write_foreign,
)
from onnx import TensorProto, helper

from ensemble_kit import import_onnx
from ensemble_kit.choices import OPSET
from ensemble_kit.data.dataset import Batch
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import CheckpointError, EnsembleKitError, OutputError, ProviderError
from ensemble_kit.foreign.onnx_source import Foreign
from ensemble_kit.layers.frame_preparation import dequantise, quantise
from ensemble_kit.networks.loading import load
from ensemble_kit.store.provenance import ForeignMetadata
from ensemble_kit.store.tensor_files import open_tensors

pytestmark = pytest.mark.usefixtures("import_in_this_process")

SCHEMA = tiny_schema(widths={"rgb": WIDTH, "audio": 3}, num_classes=CLASSES, value_type="uint8")
MAPPED = {"inputs": {"rgb": "pixels"}, "num_frames": "lengths", "activation": "sigmoid"}
COUNTS = ([1], [4, 9, 1], [2, 5])


def import_model(tmp_path, path=None, *, schema=SCHEMA, **options):
    path = path or write_foreign(tmp_path / "m.onnx")
    return import_onnx(
        path, tmp_path / "foreign.safetensors", schema=schema, name="m", **{**MAPPED, **options}
    )


def refused(tmp_path, path=None, **options):
    """Import a file, which must fail and leave nothing; return the message."""
    before = set(tmp_path.iterdir()) | ({path} if path else {tmp_path / "m.onnx"})
    with pytest.raises(EnsembleKitError) as caught:
        import_model(tmp_path, path, **options)
    assert set(tmp_path.iterdir()) <= before
    return str(caught.value)


def videos_of(schema, counts, rng):
    """Return the frames of some videos, each alone and without padding, and all as one batch."""
    frames, num_frames = tiny_frames(schema, counts, rng)
    videos = [
        {name: values[row, :count].numpy() for name, values in frames.items()}
        for row, count in enumerate(counts)
    ]
    arrays = {name: values.numpy() for name, values in frames.items()}
    ids = tuple(map(str, range(len(counts))))
    return videos, Batch(ids, arrays, num_frames.numpy(), LabelLists.from_lists([]))


@pytest.mark.parametrize("counts", COUNTS)
def test_a_foreign_model_computes_what_the_original_does_of_each_video_alone(counts, tmp_path, rng):
    path = write_foreign(tmp_path / "m.onnx")
    file = import_model(tmp_path, path)
    videos, batch = videos_of(SCHEMA, counts, rng)

    model = load(file.path)
    found = model.probabilities(batch)

    assert (model.kind, model.name, model.repeats) == ("foreign", "m", 1)
    assert found.dtype == np.float32
    for row, video in enumerate(videos):
        expected = foreign_probabilities(path, dequantised(video["rgb"]))
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("form", ["raw", "dequantised", "normalised"])
def test_frames_are_given_in_the_form_that_was_asked_for(form, tmp_path, rng):
    path = write_foreign(tmp_path / "m.onnx")
    weights = foreign_weights()
    weights["fc1/w"] /= 100  # or the bytes' logits are all far from 0
    path = write_foreign(tmp_path / "m.onnx", weights=weights)
    file = import_model(tmp_path, path, frames=form)
    (video, _), batch = videos_of(SCHEMA, [3, 5], rng)

    joint = np.concatenate([dequantised(video["rgb"]), dequantised(video["audio"])], axis=1)
    lengths = np.sqrt((joint**2).sum(axis=1, keepdims=True))
    frames = {
        "raw": video["rgb"].astype(np.float32),
        "dequantised": dequantised(video["rgb"]),
        "normalised": (joint / lengths)[:, :WIDTH],
    }[form]
    expected = foreign_probabilities(path, frames)
    np.testing.assert_allclose(load(file.path).probabilities(batch)[0], expected, atol=1e-5)


def test_a_module_that_torch_exported_reads_joint_bytes_a_mask_and_a_fixed_length(
    torch_model, tmp_path, rng
):
    inputs = {"rgb+audio": "frames"}
    file = import_model(
        tmp_path, torch_model, inputs=inputs, num_frames=None, is_frame="mask", frames="raw",
        activation="none",
    )  # fmt: skip
    counts = [4, 12, 1]  # less than the fixed length, and more

    videos, batch = videos_of(SCHEMA, counts, rng)
    found = load(file.path).probabilities(batch)

    for row, video in enumerate(videos):
        expected = torch_probabilities(
            torch_model, np.concatenate([video["rgb"], video["audio"]], axis=1)
        )
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    for size, noun in (((0, 4), "videos"), ((2, 0), "frames")):
        frames = {name: values[: size[0], : size[1]] for name, values in batch.frames.items()}
        empty = replace(batch, frames=frames, num_frames=batch.num_frames[: size[0]])
        with pytest.raises(ValueError, match=rf"^frames\['rgb'\] holds 0 {noun}; at least 1 is "):
            load(file.path).probabilities(empty)


def test_the_file_holds_weights_a_graph_without_them_and_the_mapping(tmp_path):
    path = write_foreign(tmp_path / "m.onnx")
    file = import_model(tmp_path, path)

    tensors = contents_of(file.path)
    weights = foreign_weights()
    assert tensors.keys() == {"graph", *(f"weights.{name}" for name in weights)}
    for name, array in weights.items():
        np.testing.assert_array_equal(tensors[f"weights.{name}"].numpy(), array)
    graph = onnx.ModelProto.FromString(tensors["graph"].numpy().tobytes())
    onnx.checker.check_model(graph, full_check=True)
    assert [each.version for each in graph.opset_import] == [OPSET]
    assert len(tensors["graph"]) < 1000
    assert file.num_values == sum(array.size for array in weights.values())
    with open_tensors(file.path) as opened:
        metadata = opened.metadata_as(ForeignMetadata)
    assert metadata.data_schema == SCHEMA
    assert metadata.mapping.model_dump() == {
        "frames": "dequantised",
        "inputs": (
            {**GIVEN, "name": "pixels", "holds": "frames", "modalities": ("rgb",)},
            {**GIVEN, "name": "lengths", "holds": "num_frames"},
        ),
        "activation": "sigmoid",
        "max_frames": 300,
    }


def same_as_plain(tmp_path, rng, path, **options):
    """Whether a model imports to what ``foreign_model`` as it is does."""
    _, batch = videos_of(SCHEMA, [3, 7], rng)
    (tmp_path / "plain").mkdir()
    plain = import_model(tmp_path / "plain")
    found = load(import_model(tmp_path, path, **options).path).probabilities(batch)
    np.testing.assert_allclose(found, load(plain.path).probabilities(batch), atol=1e-5)
    return contents_of(tmp_path / "foreign.safetensors")


def test_weights_that_are_inputs_with_defaults_are_weights(tmp_path, rng):
    path = write_foreign(tmp_path / "m.onnx", weights_are_inputs=True)

    assert len(same_as_plain(tmp_path, rng, path)) == 5


def test_weights_that_lie_beside_the_file_are_read(tmp_path, rng):
    path = tmp_path / "m.onnx"
    onnx.save(foreign_model(), path, save_as_external_data=True, location="m.data")

    assert len(same_as_plain(tmp_path, rng, path)) == 5


def test_weights_in_constant_nodes_are_weights(tmp_path, rng):
    weights = foreign_weights()
    model = foreign_model(weights={k: v for k, v in weights.items() if k != "fc1/w"})
    value = onnx.numpy_helper.from_array(weights["fc1/w"])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["fc1/w"], value=value))
    onnx.save(model, tmp_path / "m.onnx")

    tensors = same_as_plain(tmp_path, rng, tmp_path / "m.onnx")
    np.testing.assert_array_equal(tensors["weights.fc1/w"].numpy(), weights["fc1/w"])


@pytest.mark.parametrize("type_name", ["float16", "float64"])
def test_what_is_stored_in_another_type_stays_so(type_name, tmp_path):
    weights = {name: array.astype(type_name) for name, array in foreign_weights().items()}
    model = foreign_model(weights=weights)
    for node in model.graph.node:
        if node.op_type == "Cast":
            node.attribute[0].i = helper.np_dtype_to_tensor_dtype(np.dtype(type_name))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(type_name))
    onnx.save(model, tmp_path / "m.onnx")

    file = import_model(tmp_path, tmp_path / "m.onnx")

    tensors = contents_of(file.path)
    assert {str(tensors[f"weights.{name}"].dtype) for name in weights} == {f"torch.{type_name}"}


def test_one_output_of_several_is_kept_and_only_what_leads_to_it(tmp_path, rng):
    extra = [helper.make_node("Concat", ["h3", "more"], ["features"], axis=1)]
    path = write_foreign(
        tmp_path / "m.onnx",
        extra=extra,
        inputs={"more": (TensorProto.FLOAT, ["n", 2])},
        outputs=("features", "scores"),
    )

    message = refused(tmp_path, path)
    assert message == (
        f"{path} has 2 outputs: features, scores.\n"
        "Say with --probabilities which of them has a number for each class."
    )
    same_as_plain(tmp_path, rng, path, probabilities="scores")


def test_inputs_called_like_modalities_need_no_words(tmp_path, rng):
    model = foreign_model()
    for value in [*model.graph.node, model.graph.input[0]]:
        if isinstance(value, onnx.NodeProto):
            value.input[:] = ["rgb" if name == "pixels" else name for name in value.input]
        else:
            value.name = "rgb"
    onnx.save(model, tmp_path / "m.onnx")

    same_as_plain(tmp_path, rng, tmp_path / "m.onnx", inputs={})


def test_a_record_of_one_vector_feeds_an_input_without_frames(tmp_path, rng):
    schema = SCHEMA.model_copy(update={"level": "video"})
    model = foreign_model(inputs={"pixels": (TensorProto.FLOAT, ["n", WIDTH])})
    del model.graph.node[:4]
    model.graph.node[0].input[0] = "pixels"
    del model.graph.input[1]
    onnx.save(model, tmp_path / "m.onnx")
    file = import_model(tmp_path, tmp_path / "m.onnx", schema=schema, num_frames=None)
    videos, batch = videos_of(schema, [1, 1], rng)

    feed = {"pixels": np.concatenate([dequantised(video["rgb"]) for video in videos])}
    expected = sigmoid(run_original(tmp_path / "m.onnx", feed))
    np.testing.assert_allclose(load(file.path).probabilities(batch), expected, atol=1e-5)
    assert "(videos, frames, features)" in refused(
        tmp_path, tmp_path / "m.onnx", num_frames=None, force=True
    )


def test_a_video_without_frames_is_one_frame_of_zeros(tmp_path, rng):
    path = write_foreign(tmp_path / "m.onnx")
    file = import_model(tmp_path, path)
    _, batch = videos_of(SCHEMA, [2, 5], rng)
    batch.num_frames[0] = 0

    expected = foreign_probabilities(path, np.zeros((1, WIDTH), np.float32))
    np.testing.assert_allclose(load(file.path).probabilities(batch)[0], expected, atol=1e-5)


def test_bytes_are_told_from_what_they_were_dequantised_to():
    stored = torch.arange(256, dtype=torch.uint8)

    assert torch.equal(quantise(dequantise(stored)), stored.float())


GIVEN = {"modalities": (), "layout": "frames-first"}
NUMBER, ANYTHING = r"[\d.]+", r".+"
TWO_OUTPUTS = {"outputs": ("scores", "h3")}
NO_NUMBER = [
    helper.make_node("Sub", ["scores", "scores"], ["zero"]),
    helper.make_node("Div", ["zero", "zero"], ["y"]),
]
DRAWN = [
    helper.make_node("RandomUniformLike", ["scores"], ["drawn"], dtype=TensorProto.FLOAT),
    helper.make_node("Add", ["scores", "drawn"], ["sum_of_both"]),
]
RESHAPED = [
    helper.make_node("Constant", [], ["six"], value_ints=[1, CLASSES]),
    helper.make_node("Reshape", ["scores", "six"], ["one_video"]),
]


def with_input(name, data_type, dims):
    return {"inputs": {name: (data_type, dims)}}


@pytest.mark.parametrize(
    ("model", "options", "problem", "hint"),
    [
        (
            TWO_OUTPUTS,
            {"probabilities": "tags"},
            "{path} has no output 'tags'; it has scores, h3.",
            "Name one of them with --probabilities.",
        ),
        (
            {},
            {"inputs": {"video": "pixels"}},
            "'video' is not a modality of these records, which hold rgb, audio.",
            "Use --input MODALITY=pixels with one of them, or with several: rgb+audio=pixels.",
        ),
        (
            {},
            {"is_frame": "mask"},
            "{path} has no input 'mask' that its output depends on; it has pixels, lengths.",
            "Map these inputs, and no others.",
        ),
        (
            {},
            {"num_frames": None},
            "{path}: nothing is mapped to its input lengths.",
            "Add --input MODALITY=lengths, --num-frames lengths or --is-frame lengths.",
        ),
        (
            {},
            {"num_frames": None, "is_frame": "lengths"},
            "{path}: the input lengths is (?); is_frame must be (videos, frames), with or without "
            "dimensions of size 1.",
            "Map another input, or export the model with such an input.",
        ),
        (
            with_input("pixels", TensorProto.FLOAT, [2, "t", WIDTH]),
            {},
            f"{{path}}: the input pixels is (2, ?, {WIDTH}), which takes "
            "exactly 2 videos at a time.",
            "Export the model with a free number of videos.",
        ),
        (
            {},
            {"inputs": {"audio": "pixels"}},
            f"{{path}}: the input pixels is (?, ?, {WIDTH}), but audio has 3 features per frame.",
            "Map the modalities that it was trained on, in their order.",
        ),
        (
            with_input("pixels", TensorProto.UINT8, ["n", "t", WIDTH]),
            {},
            "{path}: the input pixels holds uint8, but dequantised frames are fractions.",
            "Use --frames raw.",
        ),
        (
            with_input("lengths", TensorProto.UINT64, ["n"]),
            {},
            "{path}: the input lengths holds UINT64, which frames and counts "
            "cannot be converted to.",
            "Export the model with inputs of float32, uint8 or int64.",
        ),
        (
            {"outputs": ("h3",)},
            {},
            f"{{path}}: its output h3 has shape (1, {HIDDEN}) for 1 video of 1 frame and {CLASSES} "
            f"classes; it should have shape (1, {CLASSES}).",
            "Name the right output with --probabilities, or the right records.",
        ),
        (
            {},
            {"activation": "none"},
            f"{{path}}: its output scores ranges from -{NUMBER} to {NUMBER}; probabilities "
            "lie between 0 and 1.",
            "Use --activation sigmoid or --activation softmax, or name another output with "
            "--probabilities.",
        ),
        (
            {"extra": NO_NUMBER},
            {"probabilities": "y"},
            "{path}: its output y holds NaN for 1 video of 1 frame.",
            "Give it frames in the form that it was trained on, with --frames, or export the model "
            "again.",
        ),
        (
            {"outputs": ()},
            {},
            "{path} has no output.",
            "Export the model again from the framework that made it.",
        ),
        (
            {"extra": DRAWN, "outputs": ("sum_of_both",)},
            {},
            "{path} draws new random numbers in each run (RandomUniformLike).",
            "Export the model in its evaluation mode.",
        ),
        (
            {"extra": RESHAPED, "outputs": ("one_video",)},
            {},
            "{path}: ONNX Runtime cannot run it on 3 videos of 7 frames: " + ANYTHING,
            "Export the model with a free number of videos and of frames; if features come before "
            "frames in an input, use --input MODALITY=INPUT:channels-first.",
        ),
        (
            {"extra": [helper.make_node("Magic", ["scores"], ["y"], domain="x.y")]},
            {"probabilities": "y"},
            "{path} uses Magic of x.y, which is not an operator of ONNX.",
            "Export the model again with ONNX's own operators only.",
        ),
        (
            {"opset": 99},
            {},
            "ONNX Runtime cannot open {path}: " + ANYTHING,
            "Export the model again, for an opset that ONNX Runtime reads.",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_mapped_is_one_clear_error(model, options, problem, hint, tmp_path):
    if "probabilities" in options and "outputs" not in model:
        model = {**model, "outputs": ("y",)}
    path = write_foreign(tmp_path / "m.onnx", **model)

    message = refused(tmp_path, path, **options)

    pattern = re.escape(f"{problem.replace('{path}', str(path))}\n{hint}")
    for wild in (NUMBER, ANYTHING):
        pattern = pattern.replace(re.escape(wild), wild)
    assert re.fullmatch(pattern, message, flags=re.DOTALL), message


def test_a_model_whose_numbers_change_by_being_imported_is_refused(tmp_path, monkeypatch):
    path = write_foreign(tmp_path / "m.onnx")
    read = Foreign.tensor
    monkeypatch.setattr(Foreign, "tensor", lambda self, name: read(self, name) * 1.5)

    message = refused(tmp_path, path)

    assert re.fullmatch(
        rf"{path}: in opset {OPSET}, its probabilities differ by 0\.\d+ from those of the file on "
        r"1 video of 1 frame; the tolerance is 1e-05\.\n"
        rf"Export the model again in opset {OPSET}\.",
        message,
    )


def test_a_model_that_reads_padding_is_refused(tmp_path):
    model = foreign_model()
    model.graph.node[0].CopyFrom(
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1], keepdims=0)
    )
    del model.graph.node[1:4]
    del model.graph.input[1]
    onnx.save(model, tmp_path / "m.onnx")

    message = refused(tmp_path, tmp_path / "m.onnx", num_frames=None)

    assert re.fullmatch(
        rf"{tmp_path}/m.onnx: the probabilities of a video change by 0\.\d+ when padding follows "
        r"its frames\.\n"
        r"Map what tells frames from padding, with --num-frames or --is-frame\.",
        message,
    )


def test_an_opset_too_old_to_raise_is_refused(tmp_path):
    model = foreign_model(extra=[helper.make_node("Upsample", ["scores", "s"], ["y"])], opset=9)
    scales = onnx.numpy_helper.from_array(np.ones(2, np.float32), "s")
    model.graph.initializer.append(scales)
    model.graph.output[0].name = "y"
    model.opset_import[0].version = 1
    path = tmp_path / "m.onnx"
    onnx.save(model, path)

    assert refused(tmp_path, path) == (
        f"{path} uses opset 1, which cannot be raised to {OPSET}.\n"
        f"Export the model again with opset {OPSET}."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    weights = foreign_weights()
    weights["fc2/w"][3, 5] = value
    path = write_foreign(tmp_path / "m.onnx", weights=weights)

    assert refused(tmp_path, path) == (
        f"{path}: tensor fc2/w holds NaN or infinity.\n"
        "Use a checkpoint from before the run diverged."
    )


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(write_foreign(path).read_bytes()[:-20])

    assert refused(tmp_path, path) == (
        f"{path} is not a whole ONNX file: its fields do not add up.\n"
        "Export the file again, or copy it again from where it is whole."
    )


def test_values_outside_of_the_files_folder_are_never_read(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(foreign_model(), path, save_as_external_data=True, location="m.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.data"
    path.write_bytes(model.SerializeToString())

    assert refused(tmp_path, path) == (
        f"{path} says that the values of fc1/w lie in '../m.data', outside of its folder.\n"
        "Copy both files again from where they are whole, into one folder."
    )


def test_nothing_is_overwritten_without_force(tmp_path):
    (tmp_path / "foreign.safetensors").write_text("mine")

    with pytest.raises(OutputError) as caught:
        import_model(tmp_path)

    assert str(caught.value).startswith(f"{tmp_path / 'foreign.safetensors'} exists already.\n")
    assert (tmp_path / "foreign.safetensors").read_text() == "mine"
    import_model(tmp_path, force=True)


def test_an_interrupted_import_leaves_the_old_file(tmp_path, monkeypatch):
    file = import_model(tmp_path)
    before = file.path.read_bytes()
    interrupt_the_writing(monkeypatch)

    with pytest.raises(KeyboardInterrupt):
        import_model(tmp_path, frames="raw", force=True)

    assert file.path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def rewritten(tmp_path):
    """Write a foreign model's file again with other tensors."""
    from ensemble_kit.store.tensor_files import save_tensors

    file = import_model(tmp_path)

    def rewrite(change):
        tensors = contents_of(file.path)
        change(tensors)
        with open_tensors(file.path) as opened:
            metadata = opened.metadata_as(ForeignMetadata)
        save_tensors(file.path, tensors, metadata, force=True)
        return file.path

    return rewrite


def other_graph(**changes):
    model = foreign_model(opset=11)
    for name, value in changes.items():
        getattr(model.graph, name).append(value)
    return model.SerializeToString()


NAMELESS_TYPE = helper.make_tensor_value_info("x", 99, ["b"])
SECOND_OUTPUT = helper.make_tensor_value_info("h3", TensorProto.FLOAT, ["b", HIDDEN])


@pytest.mark.parametrize(
    "graph",
    [
        None,
        b"no graph",
        b"",
        other_graph(input=NAMELESS_TYPE),
        other_graph(output=SECOND_OUTPUT),
    ],
    ids=["missing", "garbage", "empty", "unknown type", "two outputs"],
)
def test_a_file_with_a_damaged_graph_is_refused(graph, rewritten):
    def change(tensors):
        del tensors["graph"]
        if graph is not None:
            tensors["graph"] = torch.tensor(list(graph), dtype=torch.uint8)

    path = rewritten(change)

    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: tensor graph is missing, or is not the ONNX graph of the metadata.\n"
        "Import the model again from its ONNX file."
    )


def test_a_file_with_a_missing_weight_is_refused(rewritten):
    path = rewritten(lambda tensors: tensors.pop("weights.fc1/b"))

    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: tensor weights.fc1/b is missing; the model needs shape ({HIDDEN},).\n"
        "Write the file again with this version of ensemble-kit."
    )


def test_a_graph_that_cannot_be_opened_is_refused(rewritten, rng):
    def change(tensors):
        graph = onnx.ModelProto.FromString(tensors["graph"].numpy().tobytes())
        graph.graph.node[0].op_type = "Nonsense"
        tensors["graph"] = torch.frombuffer(bytearray(graph.SerializeToString()), dtype=torch.uint8)

    model = load(rewritten(change))

    with pytest.raises(ProviderError) as caught:
        model.probabilities(videos_of(SCHEMA, [2], rng)[1])
    assert re.fullmatch(
        r"ONNX Runtime cannot open the graph of m: .*Nonsense.*\n"
        r"Import the model again from its ONNX file\.",
        str(caught.value),
        flags=re.DOTALL,
    )
