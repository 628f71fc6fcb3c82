"""One file opened with its weights mapped."""

import numpy as np
import onnx
import onnxruntime
import pytest

from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.mapping import MIN_BYTES, mapped_model
from ensemble_kit.serving.onnx_file import needed_files, read_properties, read_tensors


@pytest.fixture
def opened(monkeypatch):
    """Return a list that is filled with the models that sessions are given."""
    models = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, model, *arguments, **options):
            models.append(model)
            super().__init__(model, *arguments, **options)

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    return models


def probabilities(path, ensemble, **options):
    frames, num_frames = example_frames(ensemble.schema, 3, 5)
    arrays = {name: values.numpy() for name, values in frames.items()}
    return OnnxEnsemble(path, **options).run(arrays, num_frames.numpy()).probabilities


def by_name(path, ensemble):
    """Return what ONNX Runtime computes of a file that it opens itself."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    frames, num_frames = example_frames(ensemble.schema, 3, 5)
    feed = {name: values.numpy() for name, values in frames.items()}
    return session.run(["probabilities"], feed | {"num_frames": num_frames.numpy()})[0]


def test_the_model_refers_to_the_bytes_of_its_own_file(exported):
    content = exported.path.read_bytes()
    stored = {each.name: each.num_bytes for each in read_tensors(exported.path)}

    model, properties = mapped_model(exported.path)

    assert properties == read_properties(exported.path)
    proto = onnx.load_from_string(model)
    whole = {each.name: each for each in onnx.load(exported.path).graph.initializer}
    outside = [each for each in proto.graph.initializer if each.external_data]
    assert {each.name for each in outside} == {n for n, size in stored.items() if size >= MIN_BYTES}
    assert len(outside) > 3
    for each in outside:
        entries = {entry.key: entry.value for entry in each.external_data}
        start, length = int(entries["offset"]), int(entries["length"])
        assert entries["location"] == exported.path.name
        assert content[start : start + length] == whole[each.name].raw_data
    assert proto.metadata_props == onnx.load(exported.path).metadata_props
    assert len(model) < len(content) - sum(stored[each.name] for each in outside) + 10_000


@pytest.mark.parametrize("options", [{}, {"low_memory": True}])
def test_mapped_weights_compute_the_same(options, exported, exported_int4, ensemble, opened):
    for path in (exported.path, exported_int4.path):
        opened.clear()
        found = probabilities(path, ensemble, **options)
        assert [type(model) for model in opened] == [bytes]
        np.testing.assert_allclose(found, by_name(path, ensemble), rtol=0, atol=1e-7)


def test_a_file_that_a_link_names_is_mapped_too(exported, ensemble, opened, tmp_path):
    link = tmp_path / "linked.onnx"
    link.symlink_to(exported.path)

    found = probabilities(link, ensemble)

    assert [type(model) for model in opened] == [bytes]
    np.testing.assert_array_equal(found, probabilities(exported.path, ensemble))


def test_a_runtime_that_cannot_map_opens_the_file_by_its_name(
    exported, ensemble, opened, monkeypatch
):
    expected = probabilities(exported.path, ensemble)
    monkeypatch.setattr("ensemble_kit.serving.session.FOLDER", "session.a_setting_it_does_not_know")
    opened.clear()

    found = probabilities(exported.path, ensemble)

    assert [type(model).__name__ for model in opened] == ["bytes", type(exported.path).__name__]
    np.testing.assert_array_equal(found, expected)


def test_nothing_changes_where_weights_lie_beside_already(exported, tmp_path):
    model = onnx.load(exported.path)
    path = tmp_path / "beside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=64)

    mapped = onnx.load_from_string(mapped_model(path).content)

    assert needed_files(path, read_tensors(path))[1:] == [tmp_path / "weights"]
    assert mapped == onnx.load(path, load_external_data=False)
