"""Own features become records that the kit's reader gives back, and what is wrong is named."""

import gzip
import os

import numpy as np
import pytest
from feature_files import ONE, VIDEOS, read, write_labels, write_npy, write_npz_table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ensemble_kit.data.conversion import convert, parse_split, split_of
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.encode import dequantise
from ensemble_kit.errors import OutputError, RecordError


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
    with pytest.raises(RecordError, match="is no split: expected NAME=SHARE, and each name once"):
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
