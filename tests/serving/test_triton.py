import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from ensemble_kit.errors import OutputError
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.triton import (
    TritonConfig,
    refuse_repository,
    repository_config,
    write_repository,
)

TYPES = {"TYPE_UINT8": np.uint8, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


@pytest.fixture(scope="module")
def proto():
    """Triton's own ``model_config.proto``, which its client brings.

    The module is loaded by itself, for its package wants gRPC.
    """
    home = pytest.importorskip("tritonclient").__path__[0]
    path = Path(home) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parse(proto):
    """Read a configuration as Triton does: protobuf's text format, unknown fields refused."""
    return lambda text: text_format.Parse(text, proto.ModelConfig())


@pytest.fixture(scope="module")
def numpy_types(proto):
    return {proto.DataType.Value(name): kind for name, kind in TYPES.items()}


def request(config, batch_size, numpy_types):
    """Make up a batch as Triton would give it to the model: batch first, then reshaped."""
    feed = {}
    for each in config.input:
        dims = each.reshape.shape if each.HasField("reshape") else each.dims
        shape = (batch_size, *(5 if size == -1 else size for size in dims))
        feed[each.name] = np.ones(shape, numpy_types[each.data_type])
    return feed


def test_the_repository_serves_what_its_configuration_says(exported, parse, numpy_types, tmp_path):
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
        outputs = session.run(None, request(config, batch_size, numpy_types))
        for each, values in zip(config.output, outputs, strict=True):
            assert values.shape == (batch_size, *each.dims)
            assert values.dtype == numpy_types[each.data_type]
    assert [each.name for each in config.output if each.label_filename == "labels.txt"] == [
        "probabilities"
    ]


def test_how_it_is_served_is_in_the_words_of_tritons_own_proto(exported, parse, tmp_path):
    config = TritonConfig(instances=3, max_delay=500, warms_up=True)
    metadata = read_metadata(exported.path)

    path = write_repository(exported.path, metadata, tmp_path, config, force=False)

    found = parse(path.read_text())
    assert [group.count for group in found.instance_group] == [3]
    assert found.dynamic_batching.max_queue_delay_microseconds == 500
    plain = parse(repository_config(metadata, name="e"))
    assert not plain.model_warmup
    assert (plain.instance_group[0].count, plain.dynamic_batching) == (1, type(
        plain.dynamic_batching)())  # fmt: skip


def test_the_request_that_warms_up_is_one_that_the_file_takes(
    exported, parse, numpy_types, tmp_path
):
    config = TritonConfig(warms_up=True)
    metadata = read_metadata(exported.path)
    path = write_repository(exported.path, metadata, tmp_path, config, force=False)

    (warm_up,) = parse(path.read_text()).model_warmup

    feed = {}
    for name, each in warm_up.inputs.items():
        values = np.zeros((warm_up.batch_size, *each.dims), numpy_types[each.data_type])
        if each.input_data_file:
            raw = (path.parent / "warmup" / each.input_data_file).read_bytes()
            values = np.frombuffer(raw, values.dtype).reshape(values.shape)
        feed[name] = values[:, 0] if name == "num_frames" else values
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    probabilities, *_ = session.run(None, feed)
    assert probabilities.shape == (1, 6)
    assert feed["num_frames"].tolist() == [feed["rgb"].shape[1]]


@pytest.mark.parametrize("wrong", [{"instances": 0}, {"max_delay": -1}])
def test_what_triton_would_refuse_is_refused(wrong):
    with pytest.raises(ValueError, match="they must be at least 1 and 0"):
        TritonConfig(**wrong)


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
