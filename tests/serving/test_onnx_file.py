import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ensemble_kit.errors import ExportError
from ensemble_kit.serving.onnx_file import (
    CONTENT_SHA256,
    PAGE,
    StoredTensor,
    Weight,
    is_whole,
    read_properties,
    read_tensors,
    write_beside,
    write_onnx,
)

ARRAYS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "whole": np.arange(-3, 4, dtype=np.int8),
    "one": np.array(7, np.int64),
    "none": np.empty((0, 5), np.float16),
}
PROPERTIES = {"name": "é" * 200, "empty": ""}


def holds(path):
    return is_whole(path, read_properties(path))


def weight_of(name, array):
    data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    flat = array.reshape(-1).view(np.uint8)
    return Weight(name, data_type, array.shape, lambda: flat)


def parts():
    """Return a model without its graph, and a graph of an initialiser and a node."""
    own = numpy_helper.from_array(np.ones(2, np.float32), "own")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], initializer=[own]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.ClearField("graph")
    return model.SerializeToString(), graph.SerializeToString()


def write(path, *, beside=None):
    weights = [weight_of(name, array) for name, array in ARRAYS.items()]
    references = write_beside(beside, weights, location=beside.name) if beside else None
    write_onnx(path, *parts(), weights, PROPERTIES, references=references)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("onnx") / "m.onnx")


def refused(function, path):
    with pytest.raises(ExportError) as caught:
        function(path)
    return str(caught.value)


def test_onnx_reads_what_was_written(written):
    model = onnx.load(written)

    onnx.checker.check_model(model, full_check=True)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert list(found) == ["own", *ARRAYS]
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert PROPERTIES.items() <= properties.items()


def test_what_onnx_wrote_is_read(written, tmp_path):
    again = tmp_path / "again.onnx"
    onnx.save(onnx.load(written), again)

    assert read_tensors(again) == read_tensors(written)
    assert read_tensors(written) == [
        StoredTensor("own", "FLOAT", (2,), 8, None),
        StoredTensor("w", "FLOAT", (3, 4), 48, None),
        StoredTensor("whole", "INT8", (7,), 7, None),
        StoredTensor("one", "INT64", (), 8, None),
        StoredTensor("none", "FLOAT16", (0, 5), 0, None),
    ]
    assert read_properties(again) == read_properties(written)
    assert PROPERTIES.items() <= read_properties(written).items()


def test_values_beside_the_file_are_found_by_onnx_on_pages_of_their_own(written, tmp_path):
    path = write(tmp_path / "m.onnx", beside=tmp_path / "m.data")

    model = onnx.load(path)

    inside = [tensor._replace(location="m.data") for tensor in read_tensors(written)[1:]]
    assert read_tensors(path)[1:] == inside
    for tensor in model.graph.initializer[1:]:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), ARRAYS[tensor.name])
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(path, load_external_data=False).graph.initializer[1:]
    ]
    assert [int(place["offset"]) % PAGE for place in places] == [0] * len(ARRAYS)
    assert (holds(path), holds(written)) == (True, True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_or_cut_file_never_passes_for_whole(written, tmp_path_factory, data):
    content = written.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        del damaged[place:]
    else:
        damaged[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.onnx"
    path.write_bytes(damaged)

    with contextlib.suppress(ExportError):  # or its fields do not even add up
        assert not holds(path)


def test_a_file_of_no_such_hash_is_not_whole(tmp_path):
    path = tmp_path / "m.onnx"
    write_onnx(path, *parts(), [weight_of("w", ARRAYS["w"])], {})
    assert holds(path)
    model = onnx.load(path)
    assert [entry.key for entry in model.metadata_props] == [CONTENT_SHA256]
    del model.metadata_props[:]
    onnx.save(model, path)

    assert not holds(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a\x7f",  # a graph of 127 bytes that is not there
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # of more than any file has
        b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",  # a number without an end
        b"\x0b\x00",  # a wire type that there is not
        b"\x72\x04\x0a\x02\xff\xfe",  # a property whose key is no text
        b"\x3a\x0a\x2a\x08\x08\x03\x10\x01\x4a\x02\x00\x00",  # three floats in two bytes
        b"not a model",
    ],
)
def test_a_file_whose_fields_do_not_add_up_is_refused(content, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)

    assert refused(lambda path: (read_properties(path), read_tensors(path)), path) == (
        f"{path} is not a whole ONNX file: its fields do not add up.\n"
        "Export the file again, or copy it again from where it is whole."
    )


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "no.onnx"

    assert refused(read_tensors, path) == (
        f"{path} cannot be read: No such file or directory.\nName a file that you may read."
    )


def beside(tmp_path, **changes):
    """Write a file that says its values lie in another place than they do."""
    write(tmp_path / "m.onnx", beside=tmp_path / "m.data")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for entry in model.graph.initializer[1].external_data:
        entry.value = changes.get(entry.key, entry.value)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"location": "../m.data"}, "in '../m.data', outside of its folder"),
        ({"location": "/etc/passwd"}, "in '/etc/passwd', outside of its folder"),
        ({"location": ".."}, "in .., which does not exist"),
        ({"location": ""}, "in '', outside of its folder"),
        ({"location": "other.data"}, "in other.data, which does not exist"),
        ({"offset": "99999999"}, "beyond the end of m.data"),
        ({"offset": "-1"}, "beyond the end of m.data"),
        ({"length": "99999999"}, "beyond the end of m.data"),
    ],
)
def test_values_are_looked_for_in_the_files_own_folder_only(changes, where, tmp_path):
    path = beside(tmp_path, **changes)

    assert refused(read_tensors, path) == (
        f"{path} says that the values of w lie {where}.\n"
        "Copy both files again from where they are whole, into one folder."
    )


def test_values_cut_short_are_refused(tmp_path):
    path = write(tmp_path / "m.onnx", beside=tmp_path / "m.data")
    with (tmp_path / "m.data").open("rb+") as file:
        file.truncate(40)  # of the 48 bytes of the first

    assert "the values of w lie beyond the end of m.data" in refused(read_tensors, path)


def test_a_weight_of_other_bytes_than_its_type_and_shape_take_is_refused(tmp_path):
    weight = weight_of("w", np.ones((2, 3), np.float32))._replace(shape=(2, 4))

    with pytest.raises(ExportError) as caught:
        write_onnx(tmp_path / "e.onnx", b"", b"", [weight], {})

    assert str(caught.value) == (
        "w has 24 bytes where its type and shape take 32.\n"
        "Copy the file that it is read from again from where it is whole."
    )
