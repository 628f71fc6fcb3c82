import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from builders import tiny_recipe, tiny_schema, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

from ensemble_kit.errors import CheckpointError, OutputError
from ensemble_kit.store.provenance import CheckpointMetadata, FusedMetadata, TrainingStateMetadata
from ensemble_kit.store.tensor_files import (
    TensorSpec,
    open_tensors,
    save_tensors,
    spec_of,
    write_tensors,
)

TORCH_TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NAMES = ("a", "b", "ü", '"')


def note(*, count, words="", **others):
    """Return metadata with few fields."""
    return TrainingStateMetadata(
        kit_version="1", name="note", settings={"words": words}, is_finished=True, step=count,
        batches=0, examples=0, seconds=0.0, measured=(), **others,
    )  # fmt: skip


def message_of(path, metadata_type=None):
    """Return the whole message of opening a file, and asking for its metadata."""
    with pytest.raises(CheckpointError) as caught:
        read(path, metadata_type)
    return str(caught.value)


def read(path, metadata_type=None):
    with open_tensors(path) as file:
        if metadata_type is not None:
            file.metadata_as(metadata_type)


def write_raw(path, header, data):
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.fixture
def checkpoint(path):
    write_checkpoint(path, tiny_recipe(), tiny_schema(label_names=NAMES), step=7)
    return path


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3)])
def test_every_type_and_shape_comes_back_as_it_was(dtype, shape, path, rng):
    tensor = (torch.randn(shape, generator=rng) * 100).to(dtype)

    tensors = {"odd": torch.ones(1, dtype=torch.uint8), "t": tensor}
    save_tensors(path, tensors, note(count=1), force=False)

    with open_tensors(path) as file:
        stored = file.tensor("t")
        assert file.specs["t"] == spec_of(tensor)
        assert dict(file.tensors()).keys() == {"odd", "t"}
    assert stored.dtype == dtype
    assert torch.equal(stored, tensor)
    assert torch.equal(load_file(path)["t"], tensor)


@pytest.mark.parametrize("dtype", [d for d in TORCH_TYPES if d != torch.bfloat16], ids=str)
def test_arrays_come_back_as_they_were_and_in_part(dtype, path, rng):
    array = (torch.randn(5, 3, generator=rng) * 100).to(dtype).numpy()

    save_tensors(path, {"a": array, "none": array[:0]}, note(count=1), force=False)

    with open_tensors(path) as file:
        assert file.array("a").dtype == array.dtype
        np.testing.assert_array_equal(file.array("a"), array)
        rows = file.rows("a")
        assert file.array("none").shape == (0, 3)
    read = rows.read(np.array([4, 1, 2]))
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array[[4, 1, 2]])


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4),
        st.tuples(st.sampled_from(TORCH_TYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_any_set_of_tensors_is_a_file_that_safetensors_reads(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    names = {name: spec for name, spec in shapes.items() if name != "__metadata__"}
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in names.items()}

    save_tensors(path, tensors, note(count=2), force=False)

    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
    with open_tensors(path) as file:
        assert list(file.specs) == sorted(tensors)


def test_strided_and_grad_tensors_are_written_by_value(path):
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))

    tensors = {
        "t": parameter.T,
        "every second": torch.arange(6.0)[::2],
        "n": np.arange(6.0).reshape(2, 3).T,
    }
    save_tensors(path, tensors, note(count=1), force=False)

    with open_tensors(path) as file:
        assert file.tensor("t").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        assert file.tensor("every second").tolist() == [0.0, 2.0, 4.0]
        assert file.array("n").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_every_tensor_is_aligned_to_its_own_size(path):
    narrow_first = enumerate(reversed(TORCH_TYPES))  # by name, which is not the order in the file
    tensors = {f"{i}{dtype}": torch.ones(3, dtype=dtype) for i, dtype in narrow_first}

    save_tensors(path, tensors, note(count=1), force=False)

    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]
    assert len(header) == len(tensors)
    for name, tensor in tensors.items():
        start = 8 + size + header[name]["data_offsets"][0]
        assert start % tensor.element_size() == 0


def test_tensors_are_produced_one_at_a_time_once_each(path):
    specs = {"b": TensorSpec("F32", (2,)), "a": TensorSpec("F32", ()), "c": TensorSpec("F64", ())}
    asked = []

    def produce(name):
        asked.append(name)
        return np.zeros(specs[name].shape, np.float64 if name == "c" else np.float32)

    write_tensors(path, specs, produce, note(count=1), force=False)

    assert sorted(asked) == ["a", "b", "c"]


def test_the_metadata_comes_back_and_is_the_only_metadata(checkpoint):
    with open_tensors(checkpoint) as file:
        metadata = file.metadata_as(CheckpointMetadata)
        assert file.kind == "checkpoint"
    with safe_open(checkpoint, framework="np") as file:
        assert list(file.metadata()) == ["ensemble_kit"]

    assert metadata.step == 7
    assert metadata.data_schema == tiny_schema(label_names=NAMES)
    assert metadata.recipe == tiny_recipe().metadata
    assert metadata.batch_norm == "trained"


def test_the_same_content_is_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_checkpoint(tmp_path / name, tiny_recipe(), tiny_schema())

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_half_written_is_left_when_a_tensor_cannot_be_made(path):
    save_tensors(path, {"t": torch.ones(1)}, note(count=1), force=False)
    before = path.read_bytes()

    def produce(name):
        if name == "b":
            raise RuntimeError("no memory")
        return np.zeros(3, np.float32)

    specs = {"a": TensorSpec("F32", (3,)), "b": TensorSpec("F32", (3,))}
    with pytest.raises(RuntimeError, match="no memory"):
        write_tensors(path, specs, produce, note(count=2), force=True)

    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_tensor_of_other_bytes_than_its_type_and_shape_take_is_refused(path):
    specs = {"t": TensorSpec("F32", (3,))}

    with pytest.raises(CheckpointError) as caught:
        write_tensors(path, specs, lambda _: np.zeros(2, np.float32), note(count=1), force=False)

    assert str(caught.value).endswith(
        "t has 8 bytes where its type and shape take 12.\n"
        "Copy the files that it is made from again from where they are whole."
    )
    assert os.listdir(path.parent) == []


def test_an_existing_file_is_kept_without_force(path):
    save_tensors(path, {}, note(count=1), force=False)

    with pytest.raises(OutputError) as caught:
        save_tensors(path, {}, note(count=2), force=False)

    assert str(caught.value) == (
        f"{path} exists already.\nName another output, or replace it with --force."
    )


def test_a_missing_file_is_named(path):
    assert message_of(path) == f"{path} does not exist.\nName a file that exists."


def test_a_file_of_safetensors_own_is_not_ours(path):
    save_file({"t": np.ones(2, np.float32)}, path)

    assert message_of(path) == (
        f"{path} has no metadata of ensemble-kit.\nName a file that ensemble-kit wrote."
    )


def test_another_kind_of_file_is_named(checkpoint):
    assert message_of(checkpoint, FusedMetadata) == (
        f"{checkpoint} is a checkpoint file, not a fused file.\nName a fused file instead."
    )


AGAIN = "Make the file again with this version of ensemble-kit."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        ("[]", "Input should be a table"),
        ("3", "Input should be a table"),
        ("{}", "kind is missing"),
        ('{"kind": 3}', "kind is 3: Input should be a valid string"),
    ],
)
def test_metadata_that_is_no_object_with_a_kind_is_damaged(path, text, problem):
    save_file({}, path, metadata={"ensemble_kit": text})

    assert message_of(path) == f"{path}: its metadata is damaged: {problem}.\n{AGAIN}"


def test_a_kind_of_a_later_version_is_refused_by_name(path):
    save_file({}, path, metadata={"ensemble_kit": '{"kind": "note"}'})

    assert message_of(path) == (
        f"{path} is a file of the kind 'note', which this version of ensemble-kit does not know.\n"
        f"{AGAIN}"
    )


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"step": ...}, "step is missing"),
        ({"step": "3"}, "step is '3': Input should be a valid integer"),
        ({"stepp": 1}, "stepp is not a key of its metadata (did you mean 'step'?)"),
        ({"measured": [{"step": 1, "gap": "x"}]},
         "measured[0].gap is 'x': Input should be a valid number"),
        ({"name": ["y" * 500]}, f"name is ['{'y' * 75}...: Input should be a valid string"),
    ],
)  # fmt: skip
def test_metadata_is_read_strictly_when_the_file_is_opened(path, changed, problem):
    metadata = note(count=3).model_dump(mode="json") | changed
    metadata = {key: value for key, value in metadata.items() if value is not ...}
    save_file({}, path, metadata={"ensemble_kit": json.dumps(metadata)})

    assert message_of(path) == f"{path}: its metadata is damaged: {problem}.\n{AGAIN}"


def test_the_metadata_is_parsed_once_for_each_open_file(checkpoint):
    with open_tensors(checkpoint) as file:
        assert file.metadata_as(CheckpointMetadata) is file.metadata_as(CheckpointMetadata)
        assert file.metadata_as(CheckpointMetadata) is file.metadata


def assert_not_whole(path):
    """Opening the file is refused, with the library's own reason, whose words are its own."""
    with pytest.raises(SafetensorError) as theirs, safe_open(path, framework="np"):
        pytest.fail("safetensors must refuse it")
    assert message_of(path) == (
        f"{path} is not a whole safetensors file: {theirs.value}.\n"
        "Make the file again, or copy it again from where it is whole."
    )


@pytest.mark.parametrize("num_bytes", [1, 100, 4000])
def test_a_truncated_file_is_refused(checkpoint, num_bytes):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-num_bytes])

    assert_not_whole(checkpoint)


def test_a_file_with_something_after_it_is_refused(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes() + b"more")

    assert_not_whole(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 20) + b"{}",
        struct.pack("<Q", 4) + b"{ope",
    ],
    ids=["empty", "short", "long header", "no JSON"],
)
def test_what_is_no_whole_safetensors_file_is_refused(path, content):
    path.write_bytes(content)

    assert_not_whole(path)


@pytest.mark.parametrize(
    "content",
    [
        b"VideoId,LabelConfidencePairs\na,1 0.5\n",
        b"\xff" * 40,
        pickle.dumps({"weights": [1.0] * 40}),
        struct.pack("<Q", 4) + b"nope",
    ],
    ids=["CSV", "garbage", "pickle", "no JSON"],
)
def test_a_file_of_another_kind_is_not_said_to_have_a_header(path, content):
    path.write_bytes(content)

    assert message_of(path) == (
        f"{path} is not a safetensors file.\n"
        "Name a checkpoint or another .safetensors file that ensemble-kit wrote."
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("F32", [1], [0, 8]),
        ("F32", [2], [0, 4]),
        ("F32", [1], [4, 8]),
        ("F32", [3], [0, 12]),
        ("F32", [2], [8, 0]),
        ("F31", [2], [0, 8]),
    ],
    ids=["too many bytes", "too few bytes", "a hole", "beyond the end", "backwards", "no type"],
)
def test_a_header_that_lies_is_refused(path, dtype, shape, offsets):
    spec = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    write_raw(path, {"t": spec}, b"\x00" * 8)

    assert_not_whole(path)


class Explosive:
    """Unpickling one runs code."""

    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def test_nothing_is_ever_unpickled(path):
    path.write_bytes(pickle.dumps(Explosive()))
    message_of(path)

    torch.save({"weights": Explosive()}, path)
    message_of(path)


def test_a_tensor_may_be_written_in_blocks(path, rng):
    whole = {"a": torch.randn(3, 4, generator=rng), "b": torch.arange(5), "c": torch.empty(0, 2)}
    specs = {name: spec_of(tensor) for name, tensor in whole.items()}
    expected = path.with_name("whole.safetensors")
    save_tensors(expected, whole, note(count=1), force=False)

    write_tensors(
        path, specs, lambda name: iter(whole[name].flatten().split(5)), note(count=1), force=False
    )

    assert path.read_bytes() == expected.read_bytes()


def test_the_metadata_may_be_completed_when_all_is_written(path):
    seen = []

    def produce(name):
        seen.append(name)
        return np.arange(3)

    def final():
        return note(count=len(seen), words="one")

    specs = {name: TensorSpec("I64", (3,)) for name in ("a", "b")}
    write_tensors(
        path, specs, produce, note(count=0, words="xxx"), force=False, final_metadata=final
    )

    with open_tensors(path) as file:
        assert file.metadata == note(count=2, words="one")
        assert file.array("b").tolist() == [0, 1, 2]


def test_parts_of_a_tensor_are_read_into_a_buffer(path):
    save_tensors(path, {"a": np.arange(7), "ü": np.ones(3, np.uint8)}, note(count=1), force=False)
    target = np.zeros(3, np.int64)

    with open_tensors(path) as file:
        file.read_into(target.view(np.uint8), "a", 16)
        file.read_into(target[:0].view(np.uint8), "ü", 3)

    assert target.tolist() == [2, 3, 4]


def test_a_file_that_is_cut_short_while_it_is_open_is_named(path):
    save_tensors(path, {"a": np.arange(7000)}, note(count=1), force=False)

    with open_tensors(path) as file:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointError) as caught:
            file.read_into(np.zeros(8, np.uint8), "a", 8 * 6999)

    assert str(caught.value) == (
        f"{path} became shorter while it was read.\n"
        "Make the file again, or copy it again from where it is whole."
    )
