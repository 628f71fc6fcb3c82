"""Files of features that other tools leave, read by convert."""

import re

import numpy as np
import pytest
from feature_files import VIDEOS, WRITERS, read, write_labels

from ensemble_kit.data.conversion import convert
from ensemble_kit.errors import RecordError


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_becomes_the_same_records(tmp_path, labels, write):
    (tmp_path / "in").mkdir()

    converted = convert(write(tmp_path / "in"), labels, tmp_path / "out")

    assert sum(converted.videos.values()) == 4
    assert converted.schema.level == "frame"
    assert sorted(converted.schema.interface) == [("audio", 3, "float32"), ("rgb", 5, "float32")]
    found = read(tmp_path / "out")
    assert {video: classes for video, (_, classes) in found.items()} == {
        "v0": [0], "v1": [1], "v2": [2], "v3": [0]
    }  # fmt: skip
    for video, each in VIDEOS.items():
        for name, array in each.items():
            np.testing.assert_array_equal(found[video][0][name], array)


def test_objects_are_never_unpickled_and_damage_is_named(tmp_path, labels):
    path = tmp_path / "a.npz"
    np.savez(path, ids=np.array(["v0"], object), rgb=np.ones((1, 2)))
    with pytest.raises(RecordError) as error:
        convert([path], labels, tmp_path / "out")
    assert error.value.problem == (
        f"{path} cannot be read: it holds Python objects, which are never unpickled."
    )
    for name in ("a.npz", "a.npy", "a.h5", "a.parquet", "a.pb", "a.tfrecord", "a.txt"):
        (tmp_path / name).write_bytes(b"\x0b" * 70)
        with pytest.raises(RecordError):
            convert([tmp_path / name], labels, tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ([1.0], "is no list of numbers"),
        (["x"], "is no list of numbers"),
        ([[[1.0, 2.0], [3.0]]], "is no list of numbers, nor one of frames of the same width"),
        ([None], "is no list of numbers"),
        ([[1.0, None]], "rgb holds nan in frame 1, feature 2"),
        ([[]], "of shape (0,), expected numbers"),
    ],
)
def test_a_parquet_column_of_something_else_is_named(tmp_path, column, problem):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    labels = write_labels(tmp_path / "y.csv", ["a"])
    parquet.write_table(arrow.table({"id": ["a"], "rgb": column}), tmp_path / "a.parquet")

    with pytest.raises(RecordError, match=re.escape(problem)):
        convert([tmp_path / "a.parquet"], labels, tmp_path / "out")


def test_bytes_of_parquet_stay_bytes(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    labels = write_labels(tmp_path / "y.csv", ["a"])
    column = arrow.array([[[1, 2], [3, 4]]], arrow.list_(arrow.list_(arrow.uint8())))
    parquet.write_table(arrow.table({"id": ["a"], "rgb": column}), tmp_path / "a.parquet")

    convert([tmp_path / "a.parquet"], labels, tmp_path / "out")

    assert read(tmp_path / "out")["a"][0]["rgb"].tolist() == [[1, 2], [3, 4]]
