import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ensemble_kit.averaging.mean import MeanOfFiles
from ensemble_kit.errors import CheckpointError
from ensemble_kit.store.provenance import TrainingStateMetadata
from ensemble_kit.store.tensor_files import METADATA_KEY, TensorFile, open_tensors

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
METADATA = TrainingStateMetadata(
    kit_version="1", name="note", settings={}, is_finished=True, step=1, batches=0, examples=0,
    seconds=0.0, measured=(),
)  # fmt: skip
MANY = settings(max_examples=50, deadline=None)


def mean_of(contents, folder, *, statistics=None, block_values=4):
    """Write each dict of tensors to its own file; return the mean of every tensor."""
    with ExitStack() as stack:
        files = []
        for number, tensors in enumerate(contents):
            path = Path(folder) / f"{number}.safetensors"
            save_file(tensors, path, metadata={METADATA_KEY: METADATA.model_dump_json()})
            files.append(stack.enter_context(open_tensors(path)))
        mean = MeanOfFiles(
            files,
            statistics=None if statistics is None else files[statistics],
            block_values=block_values,
        )
        return {name: mean.tensor(name) for name in mean.specs}


def column(values, dtype=torch.float32):
    return {"values": torch.tensor(values, dtype=dtype)}


@MANY
@given(st.lists(FLOATS, min_size=1, max_size=11), st.integers(1, 9))
def test_copies_average_to_themselves_exactly(values, copies):
    with TemporaryDirectory() as folder:
        mean = mean_of([column(values)] * copies, folder)["values"]

    assert mean.tolist() == torch.tensor(values).tolist()
    assert mean.dtype == torch.float32


@MANY
@given(st.data(), st.integers(1, 11), st.integers(1, 5), st.integers(1, 12))
def test_any_block_size_gives_the_mean_of_float64_sums(data, length, num_files, block):
    rows = data.draw(
        st.lists(
            st.lists(FLOATS, min_size=length, max_size=length),
            min_size=num_files,
            max_size=num_files,
        )
    )

    with TemporaryDirectory() as folder:
        mean = mean_of([column(row) for row in rows], folder, block_values=block)["values"]

    for index in range(length):
        total = np.float64(0)
        for row in rows:
            total += np.float64(row[index])
        assert mean[index].item() == np.float32(total / num_files)


@MANY
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=5))
def test_counts_take_the_largest_exactly(counts):
    with TemporaryDirectory() as folder:
        mean = mean_of([column([count], torch.int64) for count in counts], folder)["values"]

    assert mean.tolist() == [max(counts)]
    assert mean.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floating_types_are_rounded_once_from_the_float64_sum(dtype, tmp_path, rng):
    rows = [torch.randn(7, generator=rng).to(dtype) for _ in range(3)]

    mean = mean_of([{"values": row} for row in rows], tmp_path)["values"]

    assert mean.dtype == dtype
    assert torch.equal(mean, (sum(row.double() for row in rows) / 3).to(dtype))


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8, torch.bool], ids=str)
def test_every_shape_and_type_has_a_mean_of_its_own(shape, dtype, tmp_path, rng):
    tensors = [(torch.randn(shape, generator=rng) > 0).to(dtype) for _ in range(2)]

    mean = mean_of([{"values": tensor} for tensor in tensors], tmp_path)["values"]

    expected = sum(tensors) / 2 if dtype == torch.float32 else torch.stack(tensors).amax(dim=0)
    assert torch.equal(mean, expected)
    assert mean.dtype == dtype


def test_statistics_may_come_from_one_file_and_the_rest_from_all(tmp_path):
    contents = [
        {"norm.running_mean": torch.full((5,), 1.0 * n), "norm.running_variance": torch.ones(2) * n,
         "norm.scale": torch.full((6,), 1.0 * n)} for n in (2, 7, 3)
    ]  # fmt: skip

    mean = mean_of(contents, tmp_path, statistics=1)

    assert mean["norm.running_mean"].tolist() == [7] * 5
    assert mean["norm.running_variance"].tolist() == [7] * 2
    assert mean["norm.scale"].tolist() == [4] * 6


def test_no_more_than_a_block_of_a_file_is_ever_asked_for(tmp_path, monkeypatch):
    asked = []
    whole = TensorFile.read_into

    def read_into(self, target, name, start):
        asked.append((os.path.basename(self.path), start, target.nbytes))
        whole(self, target, name, start)

    monkeypatch.setattr(TensorFile, "read_into", read_into)
    monkeypatch.delattr(TensorFile, "tensor")

    mean_of([column(range(10)), column(range(10))], tmp_path)

    assert asked == [
        (f"{file}.safetensors", start, size)
        for start, size in ((0, 16), (16, 16), (32, 8))
        for file in (0, 1)
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_file_that_holds_a_value_that_is_none_is_named(value, tmp_path):
    rows = [[1.0] * 10, [1.0] * 10, [1.0] * 10]
    rows[1][9] = value
    rows[2][9] = -value  # a sum of both infinities is no infinity

    with pytest.raises(CheckpointError) as caught:
        mean_of([column(row) for row in rows], tmp_path)

    assert str(caught.value) == (
        f"{tmp_path}/1.safetensors: tensor values holds NaN or infinity.\n"
        "Use a checkpoint from before the run diverged."
    )


def test_the_largest_float32_values_are_no_infinity(tmp_path):
    largest = torch.finfo(torch.float32).max

    mean = mean_of([column([largest] * 7)] * 3, tmp_path)["values"]

    assert mean.tolist() == [largest] * 7
