"""What does not fit in memory: where it lies, that it changes nothing, and how it is refused."""

import os
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import OutputError
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.selection import storage
from ensemble_kit.selection.stage import select
from ensemble_kit.selection.storage import Storage, default_memory, storage_folder

Usage = namedtuple("Usage", "free")


def write_candidates(folder, *, top_k=None):
    generator = np.random.default_rng(0)
    folder.mkdir()
    paths = [folder / f"{name}.safetensors" for name in "abcd"]
    positives = [sorted({*generator.integers(9, size=2).tolist()}) for _ in range(50)]
    for path in paths:
        rows = generator.integers(0, 33, (50, 9)) / 32
        write_predictions(
            path,
            ids=[f"video{number}" for number in range(50)],
            label_names="qrstuvwxy",
            labels=LabelLists.from_lists(positives),
            rows=rows.astype(np.float32),
            name=path.stem,
            model=None,
            top_k=top_k,
            force=False,
        )
    return paths


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("strategy", ["greedy", "exhaustive"])
def test_a_small_memory_changes_no_byte_of_the_selection(tmp_path, strategy, top_k):
    paths = write_candidates(tmp_path / "predictions", top_k=top_k)
    options = {"strategy": strategy, "mixing": "optimised", "top_k": 2, "confirm": 0.5}
    written = []
    for memory in (1, 10_000, None):
        output = tmp_path / str(memory) / "selection.json"
        select(paths, output=output, memory=memory, resamples=9, **options)
        written.append(output.read_bytes())
        assert os.listdir(output.parent) == ["selection.json"]

    assert written[0] == written[1] == written[2]


def test_rows_come_back_from_a_file_that_no_folder_names(tmp_path):
    first, second = np.arange(12.0).reshape(3, 4), np.arange(10, dtype=np.int32).reshape(2, 5)
    with closing(Storage(0, tmp_path / "not" / "there")) as kept:
        rows = kept.store(first), kept.store(second)

        assert os.listdir(tmp_path) == []
        assert kept.num_stored == first.nbytes + second.nbytes
        for matrix, stored in zip((first, second), rows, strict=True):
            for index, expected in enumerate(matrix):
                np.testing.assert_array_equal(stored[index], expected)
        assert rows[0].taken([2, 0]).keys() == {0, 2}


def test_memory_is_counted_until_it_is_full():
    kept = Storage(100, Path())

    kept.reserve(30)

    assert [kept.takes(size) for size in (60, 11, 10, 1)] == [True, False, True, False]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    paths = write_candidates(tmp_path / "predictions")
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: Usage(2048))

    with pytest.raises(OutputError) as refused:
        select(paths, output=tmp_path / "out" / "selection.json", memory=1, top_k=2)

    size = str(refused.value).split("about ")[1].split(",")[0]
    assert str(refused.value) == (
        f"What does not fit in memory takes about {size}, and {tmp_path} has 2.0 KiB left.\n"
        "Free some space, set TMPDIR to a folder on a larger disk, or raise --memory."
    )
    assert size.endswith(" KiB")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    kept = Storage(0, tmp_path)
    rows = kept.store(np.zeros((1, 4)))
    with pytest.raises(OutputError) as refused:
        rows[1]
    assert str(refused.value) == (
        f"The file in {tmp_path} of what does not fit in memory cannot be read: it ends too "
        "early.\nFree some space, set TMPDIR to a folder on another disk, or raise --memory."
    )
    kept.close()

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        Storage(0, tmp_path).store(np.zeros((1, 4)))


def test_a_folder_for_temporary_files_is_taken_where_one_is_named(tmp_path, monkeypatch):
    output = tmp_path / "selection.json"
    for named, folder in ((None, tmp_path), ("/not/there", tmp_path), ("/", Path("/"))):
        monkeypatch.delenv("TMPDIR", raising=False)
        if named:
            monkeypatch.setenv("TMPDIR", named)
        assert storage_folder(output) == folder


def test_half_of_the_memory_of_the_machine_or_the_container_is_the_bound(tmp_path):
    limit = tmp_path / "memory.max"
    whole = default_memory(tmp_path / "none")
    for text, expected in (("max\n", whole), ("4096\n", 2048), (f"{8 * whole}\n", whole)):
        limit.write_text(text)
        assert default_memory(limit) == expected
