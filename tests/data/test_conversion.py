"""Own features become records that the kit's reader gives back, and what is wrong is named."""

import gzip
import json
import os
import re

import numpy as np
import pytest
from example_bytes import byte_strings, floats, record
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ensemble_kit.cli import main
from ensemble_kit.data.conversion import convert, parse_split, split_of
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.encode import dequantise
from ensemble_kit.data.tfrecord import write_records
from ensemble_kit.errors import OutputError, RecordError

ONE = {"all": 1.0}
RANDOM = np.random.default_rng(0)
VIDEOS = {
    f"v{number}": {
        "rgb": RANDOM.standard_normal((number + 1, 5), np.float32),
        "audio": RANDOM.standard_normal((number + 1, 3), np.float32),
    }
    for number in range(4)
}
MEANS = {video: {name: array[0] for name, array in each.items()} for video, each in VIDEOS.items()}


def write_labels(path, ids=VIDEOS, lines=None):
    lines = lines or [f"{video},{number % 3}" for number, video in enumerate(ids)]
    path.write_text("\n".join(["VideoId,Labels", *lines]) + "\n")
    return path


@pytest.fixture
def labels(tmp_path):
    return write_labels(tmp_path / "labels.csv")


def read(folder):
    """Return the arrays of each video of converted records, by id."""
    videos = Records([f"{folder}/*/*.tfrecord"]).videos()
    return {video.id: (video.frames, video.classes.tolist()) for video in videos}


def padded(videos, name):
    longest = max(len(each[name]) for each in videos.values())
    return np.stack(
        [np.pad(each[name], ((0, longest - len(each[name])), (0, 0))) for each in videos.values()]
    )


def mediapipe(video, **more):
    lists = {
        f"{name.upper()}/feature/floats": [floats(row) for row in array.tolist()]
        for name, array in video.items()
    }
    return record(more, lists)


def write_npy(folder):
    for name in ("rgb", "audio"):
        (folder / name).mkdir()
        for video, each in VIDEOS.items():
            np.save(folder / name / f"{video}.npy", each[name].astype(np.float64))
    return [f"{name}={folder / name}" for name in ("rgb", "audio")]


def write_npz_each(folder):
    for video, each in VIDEOS.items():
        np.savez_compressed(folder / f"{video}.npz", **each)
    return [folder]


def write_npz_table(folder):
    counts = [len(each["rgb"]) for each in VIDEOS.values()]
    table = {name: padded(VIDEOS, name) for name in ("rgb", "audio")}
    np.savez(folder / "a.npz", ids=list(VIDEOS), num_frames=counts, **table)
    return [folder / "a.npz"]


def write_hdf5_groups(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        for video, each in VIDEOS.items():
            for name, array in each.items():
                file[f"{video}/{name}"] = array
    return [folder / "a.h5"]


def write_hdf5_table(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.hdf5", "w") as file:
        file["ids"] = list(VIDEOS)
        file["num_frames"] = [len(each["rgb"]) for each in VIDEOS.values()]
        for name in ("rgb", "audio"):
            file[name] = padded(VIDEOS, name)
    return [folder / "a.hdf5"]


def write_parquet(folder):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {name: [each[name].tolist() for each in VIDEOS.values()] for name in ("rgb", "audio")}
    parquet.write_table(arrow.table({"id": list(VIDEOS), **columns}), folder / "a.parquet")
    return [folder / "a.parquet"]


def write_mediapipe(folder):
    for video, each in VIDEOS.items():
        (folder / f"{video}.pb").write_bytes(mediapipe(each))
    return [folder]


def write_mediapipe_records(folder):
    records = [
        mediapipe(each, **{"clip/media_id": byte_strings(video.encode())})
        for video, each in VIDEOS.items()
    ]
    write_records(folder / "a.tfrecord", records, force=False)
    return [folder / "a.tfrecord"]


WRITERS = [
    write_npy,
    write_npz_each,
    write_npz_table,
    write_hdf5_groups,
    write_hdf5_table,
    write_parquet,
    write_mediapipe,
    write_mediapipe_records,
]


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


def test_records_are_converted_again_with_other_labels(tmp_path, labels):
    first = convert(write_npz_table(tmp_path), labels, tmp_path / "first", split=ONE)
    other = write_labels(tmp_path / "other.csv", lines=[f"{video},7 5" for video in VIDEOS])
    (shard,) = (tmp_path / "first" / "all").iterdir()
    packed = tmp_path / "first" / "all.tfrecord.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))

    for number, path in enumerate((shard, packed)):
        again = convert([path], other, tmp_path / f"again{number}")
        assert (first.schema.num_classes, again.schema.num_classes) == (3, 8)
        found = read(tmp_path / f"again{number}")
        np.testing.assert_array_equal(found["v3"][0]["audio"], VIDEOS["v3"]["audio"])
        assert found["v3"][1] == [5, 7]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.integers(1, 4).flatmap(
            lambda count: arrays(np.float32, (count, 3), elements=st.floats(-3, 3, width=32))
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.booleans(),
)
def test_what_is_converted_is_read_back(tmp_path_factory, videos, quantised, is_video_level):
    folder = tmp_path_factory.mktemp("convert")
    held = {f"id {number}": array for number, array in enumerate(videos)}
    for video, array in held.items():
        np.save(folder / f"{video}.npy", array[0] if is_video_level else array)
    write_labels(folder / "y.csv", held)

    converted = convert([folder], folder / "y.csv", folder / "out", quantised=quantised)

    found = read(folder / "out")
    assert found.keys() == held.keys()
    largest = 0.0
    for video, array in held.items():
        (values,) = found[video][0].values()
        expected = array[:1] if is_video_level else array
        assert values.shape == expected.shape
        if quantised:
            inside = np.clip(expected, -2, 2)
            assert np.abs(dequantise(values) - inside).max() <= 2 / 255 + 4 / 512 + 1e-6
            largest = max(largest, float(np.abs(dequantise(values) - expected).max()))
        else:
            np.testing.assert_array_equal(values, expected)
    if quantised:
        (error,) = converted.quantisation.values()
        assert error.largest == pytest.approx(largest, abs=1e-6)


def test_bytes_are_read_back_as_the_sub_models_read_them():
    import torch

    from ensemble_kit.layers.frame_preparation import dequantise as in_the_graph

    every = np.arange(256, dtype=np.uint8)

    expected = in_the_graph(torch.from_numpy(every)).numpy()
    np.testing.assert_allclose(dequantise(every), expected, rtol=0, atol=2**-22)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=9), st.text(max_size=9))
def test_a_split_follows_from_the_id_alone(one, other):
    shares = parse_split("train=0.5,validate=0.5")

    assert split_of(one, shares) in shares
    assert split_of(one, shares) == split_of(one, dict(shares))


def test_splits_have_their_shares():
    shares = parse_split("train=0.8,validate=0.1,test=0.1")
    splits = [split_of(f"video {number}", shares) for number in range(5000)]

    assert splits.count("train") / 5000 == pytest.approx(0.8, abs=0.02)
    assert splits.count("test") / 5000 == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("text", ["train", "train=0", "train=x", "a=.5,a=.5", "../a=1", "a=.5,=.5"])
def test_a_split_that_cannot_be_read_is_named(text):
    with pytest.raises(RecordError, match="is no split: its own name, =, and its share"):
        parse_split(text)
    with pytest.raises(RecordError) as error:
        parse_split("a=0.5,b=0.4")
    assert str(error.value) == (
        "The splits a=0.5,b=0.4 add up to 0.9.\nGive shares that add up to 1."
    )


def nan(array):
    array[1, 2] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a[:, :4], "Video 'v1' differs in modalities and widths from the first, 'v0': "
         "features 4, not features 5."),
        (nan, "Video 'v1': features holds nan in frame 2, feature 3."),
        (lambda a: a * np.float64(1e300), "Video 'v1': features holds "),
        (lambda a: a[0], "Video 'v1' differs in level from the first, 'v0': video, not frame."),
        (lambda a: a.astype(np.uint8), "Video 'v1' differs in types from the first, 'v0': "
         "features uint8, not features float32."),
        (lambda a: a[:0], "Video 'v1': features is float32 of shape (0, 5), expected numbers "),
        (lambda a: a.astype(str), "Video 'v1': features is <U32 of shape (2, 5), expected "),
        (lambda a: a[None], "Video 'v1': features is float32 of shape (1, 2, 5), expected "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_video_is_named_and_nothing_is_left(tmp_path, labels, change, problem):
    held = tmp_path / "in"
    held.mkdir()
    for video, each in VIDEOS.items():
        array = each["rgb"].copy()
        np.save(held / f"{video}.npy", change(array) if video == "v1" else array)

    with pytest.raises(RecordError) as error:
        convert([held], labels, tmp_path / "out")

    assert error.value.problem.startswith(problem)
    assert sorted(os.listdir(tmp_path)) == ["in", "labels.csv"]


def test_missing_and_repeated_videos_are_named(tmp_path):
    features = write_npz_table(tmp_path)
    more = write_labels(tmp_path / "more.csv", [*VIDEOS, *"abcdef"])
    fewer = write_labels(tmp_path / "fewer.csv", ["v0", "v1"])
    problems = []
    for held, labels in ((features, more), (features, fewer), (features * 2, more)):
        with pytest.raises(RecordError) as error:
            convert(held, labels, tmp_path / "out")
        problems.append(error.value.problem)

    assert problems == [
        f"6 videos of {more} have no features: 'a', 'b', 'c', 'd', 'e', ....",
        f"Video 'v2' has features, but {fewer} has no line for it.",
        "Video 'v0' occurs twice among the features.",
    ]
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_a_video_that_lacks_a_modality_is_named(tmp_path, labels):
    features = write_npy(tmp_path)
    (tmp_path / "audio" / "v2.npy").unlink()

    with pytest.raises(RecordError) as error:
        convert(features, labels, tmp_path / "out")

    assert str(error.value) == (
        f"Video 'v2' has no audio, but {tmp_path}/rgb/v2.npy.\n"
        "Extract its audio, or leave the video out."
    )


def test_modalities_a_frame_apart_are_cut_and_more_is_refused(tmp_path, labels):
    for video, each in VIDEOS.items():
        apart = 1 if video == "v0" else 0
        audio = np.concatenate([each["audio"], each["audio"][:apart]])
        np.savez(tmp_path / f"{video}.npz", rgb=each["rgb"], audio=audio)
    assert convert([tmp_path], labels, tmp_path / "out").num_cut == 1

    np.savez(tmp_path / "v0.npz", rgb=np.ones((4, 5)), audio=np.ones((1, 3)))
    with pytest.raises(RecordError) as error:
        convert([tmp_path], labels, tmp_path / "again")
    assert error.value.problem == (
        "Video 'v0': its modalities differ in frames: 4 of rgb, 1 of audio."
    )


def test_labels_may_be_names(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat, wild\nbird\n")
    lines = ['v0,"cat, wild; dog"', "v1,bird", "v2,", "v3,2 0"]
    labels = write_labels(tmp_path / "labels.csv", lines=lines)

    convert(write_npz_table(tmp_path), labels, tmp_path / "out", label_names=names)

    classes = {video: each[1] for video, each in read(tmp_path / "out").items()}
    assert classes == {"v0": [0, 1], "v1": [2], "v2": [], "v3": [0, 2]}
    assert Records([tmp_path / "out" / "train"]).schema.names == ("dog", "cat, wild", "bird")

    write_labels(labels, lines=["v0,dog;cow"])
    with pytest.raises(RecordError) as error:
        convert(write_npz_table(tmp_path), labels, tmp_path / "again", label_names=names)
    assert error.value.problem == (
        f"{labels}, line 2: 'cow' is no class, expected a number from 0 to 2 or a name of the "
        "classes."
    )


def test_a_folder_is_replaced_with_force_only_and_never_with_other_files_in_it(tmp_path, labels):
    features, out = write_npz_table(tmp_path), tmp_path / "out"
    convert(features, labels, out, split={"old": 1.0})

    with pytest.raises(OutputError) as error:
        convert(features, labels, out)
    assert error.value.problem == f"{out} holds files already."
    convert(features, labels, out, split=ONE, force=True)
    assert sorted(os.listdir(out)) == ["all", "schema.toml"]
    (out / "notes.txt").touch()
    with pytest.raises(OutputError) as error:
        convert(features, labels, out, force=True)
    assert error.value.problem == (
        f"{out}/notes.txt is no file of records, and would be lost with {out}."
    )
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_shards_are_begun_when_one_is_large_and_long_videos_keep_all_frames(tmp_path):
    for video in ("a", "b", "c"):
        np.save(tmp_path / f"{video}.npy", np.ones((400, 1), np.uint8))
    labels = write_labels(tmp_path / "labels.csv", "abc")

    converted = convert([tmp_path], labels, tmp_path / "out", split=ONE, shard_bytes=300)

    assert len(list((tmp_path / "out" / "all").iterdir())) == 3
    assert converted.schema.interface == (("features", 1, "uint8"),)
    assert [len(frames["features"]) for frames, _ in read(tmp_path / "out").values()] == [400] * 3


def test_a_video_of_more_frames_than_a_schema_allows_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1_000_001, 1), np.uint8))
    labels = write_labels(tmp_path / "labels.csv", "a")

    with pytest.raises(RecordError) as error:
        convert([tmp_path], labels, tmp_path / "out")

    assert error.value.problem == (
        "Video 'a': features has the shape (1000001, 1); at most 1,000,000 frames and features "
        "can be stored."
    )


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


def test_the_command_prints_what_it_wrote_and_the_error_of_quantising(tmp_path, labels, runner):
    (features,) = write_npz_table(tmp_path)
    words = ["data", "convert", str(features), "--labels", str(labels), "-o", f"{tmp_path}/out"]

    result = runner.invoke(main, [*words, "--split", "a=1", "--quantise"])

    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"{tmp_path}/out", "a              4 videos"]
    assert lines[2].startswith("rgb            quantisation error 0.0")
    assert lines[2].endswith("of the values lie outside -2 to 2")
    result = runner.invoke(main, [*words, "--json", "--force"])
    assert sum(json.loads(result.stdout)["videos"].values()) == 4
