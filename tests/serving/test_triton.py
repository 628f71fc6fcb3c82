from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from ensemble_kit.errors import OutputError
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.triton import refuse_repository, repository_config, write_repository

FIELD = descriptor_pb2.FieldDescriptorProto
# Of model_config.proto in triton-inference-server/common: the fields that are used, their numbers
MESSAGES = {
    "ModelTensorReshape": [("shape", 1, FIELD.TYPE_INT64, True)],
    "ModelInput": [
        ("name", 1, FIELD.TYPE_STRING, False),
        ("data_type", 2, "DataType", False),
        ("dims", 4, FIELD.TYPE_INT64, True),
        ("reshape", 5, "ModelTensorReshape", False),
    ],
    "ModelOutput": [
        ("name", 1, FIELD.TYPE_STRING, False),
        ("data_type", 2, "DataType", False),
        ("dims", 3, FIELD.TYPE_INT64, True),
        ("label_filename", 4, FIELD.TYPE_STRING, False),
    ],
    "ModelDynamicBatching": [("max_queue_delay_microseconds", 2, FIELD.TYPE_UINT64, False)],
    "ModelConfig": [
        ("name", 1, FIELD.TYPE_STRING, False),
        ("max_batch_size", 4, FIELD.TYPE_INT32, False),
        ("input", 5, "ModelInput", True),
        ("output", 6, "ModelOutput", True),
        ("dynamic_batching", 11, "ModelDynamicBatching", False),
        ("backend", 17, FIELD.TYPE_STRING, False),
    ],
}
TYPES = {"TYPE_UINT8": (2, np.uint8), "TYPE_INT64": (9, np.int64), "TYPE_FP32": (11, np.float32)}
NUMPY = dict(TYPES.values())


@pytest.fixture(scope="module")
def parse():
    """Read a configuration as Triton does: protobuf's text format, unknown fields refused."""
    file = descriptor_pb2.FileDescriptorProto(name="m.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    types.value.add(name="TYPE_INVALID", number=0)
    for name, (number, _) in TYPES.items():
        types.value.add(name=name, number=number)
    for message_name, fields in MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, held, is_repeated in fields:
            field = message.field.add(name=name, number=number)
            field.label = FIELD.LABEL_REPEATED if is_repeated else FIELD.LABEL_OPTIONAL
            if isinstance(held, str):
                field.type = FIELD.TYPE_ENUM if held == "DataType" else FIELD.TYPE_MESSAGE
                field.type_name = f".inference.{held}"
            else:
                field.type = held
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return lambda text: text_format.Parse(text, kind())


def request(config, batch_size):
    """Make up a batch as Triton would give it to the model: batch first, then reshaped."""
    feed = {}
    for each in config.input:
        dims = each.reshape.shape if each.HasField("reshape") else each.dims
        shape = (batch_size, *(5 if size == -1 else size for size in dims))
        feed[each.name] = np.ones(shape, NUMPY[each.data_type])
    return feed


def test_the_repository_serves_what_its_configuration_says(exported, parse, tmp_path):
    metadata = read_metadata(exported.path)
    path = write_repository(exported.path, metadata, tmp_path / "models", force=False)

    home = tmp_path / "models" / "ensemble"
    assert path == home / "config.pbtxt"
    assert sorted(str(each.relative_to(home)) for each in home.rglob("*")) == [
        "1", "1/model.onnx", "config.pbtxt", "labels.txt"
    ]  # fmt: skip
    assert (home / "1" / "model.onnx").read_bytes() == exported.path.read_bytes()
    assert (home / "labels.txt").read_text().splitlines() == [
        "steady 0", "burst 1", "order 2", "steady 3", "burst 4", "order 5"
    ]  # fmt: skip
    config = parse(path.read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("ensemble", "onnxruntime", 32)
    assert config.HasField("dynamic_batching")
    session = onnxruntime.InferenceSession(
        home / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert [each.name for each in config.input] == [each.name for each in session.get_inputs()]
    for batch_size in (1, 3):
        outputs = session.run(None, request(config, batch_size))
        for each, values in zip(config.output, outputs, strict=True):
            assert values.shape == (batch_size, *each.dims)
            assert values.dtype == NUMPY[each.data_type]
    assert [each.name for each in config.output if each.label_filename == "labels.txt"] == [
        "probabilities"
    ]


@pytest.mark.parametrize(("are_free", "repeats"), [(True, -1), (False, 3)])
def test_draws_that_are_an_input_are_in_the_configuration(are_free, repeats, exported, parse):
    metadata = read_metadata(exported.path).model_copy(
        update={"draw_source": "input", "repeats_are_free": are_free}
    )

    config = parse(repository_config(metadata, name="e"))

    assert {each.name: list(each.dims) for each in config.input} == {
        "rgb": [-1, 7],
        "audio": [-1, 3],
        "num_frames": [1],
        "draws_bag": [repeats, 8],
        "draws_vlad": [repeats, 8],
    }


@pytest.mark.parametrize("name", ["config.pbtxt", "labels.txt", "1/model.onnx"])
def test_a_repository_that_exists_is_replaced_only_if_asked(name, exported, tmp_path):
    path = tmp_path / "ensemble" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")

    with pytest.raises(OutputError) as caught:
        write_repository(exported.path, read_metadata(exported.path), tmp_path, force=False)

    assert str(caught.value) == (
        f"{path} exists already.\nName another output, or replace it with --force."
    )
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]
    write_repository(exported.path, read_metadata(exported.path), tmp_path, force=True)
    assert path.read_bytes() != b"mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_repository_that_cannot_be_written_is_refused_before_the_export(tmp_path):
    with pytest.raises(OutputError) as caught:
        refuse_repository(tmp_path / "e.onnx", Path("/proc/models"), force=False)

    assert str(caught.value).startswith("/proc/models/e cannot be written: ")
