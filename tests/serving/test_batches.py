"""What a server holds: lists of videos of any lengths, and videos as they come."""

import re
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.batches import batches, padded

PORTS = {
    "rgb": SimpleNamespace(type="tensor(uint8)", shape=["B", "T", 4]),
    "text": SimpleNamespace(type="tensor(float)", shape=["B", "T", 2]),
    "num_frames": SimpleNamespace(type="tensor(int64)", shape=["B"]),
    "draws_a": SimpleNamespace(type="tensor(float)", shape=["B", "R", 3]),
}
FRAME_BYTES = 4 + 2 * 4
WIDTHS = {"rgb": 7, "audio": 3}  # of the exported file
ORDER = 1e-6  # float32 sums in another order: some eps of a probability


def videos_of(*lengths):
    return {
        "rgb": [np.full((length, 4), length, np.uint8) for length in lengths],
        "text": [np.full((length, 2), length, np.float32) for length in lengths],
    }


def exactly(message):
    return f"^{re.escape(message)}$"


def one_video(**changes):
    return {name: values[0] for name, values in videos_of(3).items()} | changes


def test_videos_are_padded_to_the_longest():
    batch, counts = padded(PORTS, videos_of(2, 0, 3))

    assert counts.tolist() == [2, 0, 3]
    assert batch["text"][:, :, 1].tolist() == [[2, 2, 0], [0, 0, 0], [3, 3, 3]]
    assert (batch["rgb"].shape, batch["rgb"].dtype) == ((3, 3, 4), np.uint8)
    assert padded(PORTS, videos_of(0))[0]["rgb"].shape == (1, 1, 4)  # no file takes 0 frames


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 9 * 5 * FRAME_BYTES))
def test_batches_keep_the_order_and_the_bound(lengths, max_bytes):
    videos = [{name: values[0] for name, values in videos_of(each).items()} for each in lengths]

    cut = [[len(values) for values in batch["text"]] for batch in batches(PORTS, videos, max_bytes)]

    assert list(chain(*cut)) == lengths
    sizes = [len(batch) * max(batch) * FRAME_BYTES for batch in cut]
    assert all(size <= max_bytes or len(batch) == 1 for size, batch in zip(sizes, cut, strict=True))
    for batch, following in pairwise(cut):  # no batch could have held one more
        longer = [*batch, following[0]]
        assert len(longer) * max(longer) * FRAME_BYTES > max_bytes


@pytest.fixture(scope="module")
def session(exported):
    return OnnxEnsemble(exported.path)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 300), st.data())
def test_lists_and_iterators_have_the_numbers_of_the_padded_batch(session, lengths, size, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    longest, spare = max(lengths), data.draw(st.integers(0, 3))
    batch = {
        name: rng.integers(0, 256, (len(lengths), longest + spare, width), np.uint8)
        for name, width in WIDTHS.items()
    }
    videos = {
        name: [row[:length] for row, length in zip(values, lengths, strict=True)]
        for name, values in batch.items()
    }

    expected = session.run(batch, np.array(lengths))
    of_lists = session.run(videos)
    of_each = list(
        session.run_in_batches(
            ({"rgb": rgb, "audio": audio} for rgb, audio in zip(*videos.values(), strict=True)),
            max_bytes=size,
        )
    )

    joined = [np.concatenate(parts) for parts in zip(*of_each, strict=True)]
    for found in (of_lists.probabilities, joined[0]):
        np.testing.assert_allclose(found, expected.probabilities, rtol=0, atol=ORDER)
    if not spare:
        exact = session.run({name: values[:, :longest] for name, values in batch.items()},
                            np.array(lengths))  # fmt: skip
        np.testing.assert_array_equal(of_lists.probabilities, exact.probabilities)
        np.testing.assert_array_equal(of_lists.labels, exact.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rgb": []}, "frames['rgb'] holds 0 videos; at least 1 is needed"),
        (
            {"text": [np.zeros((3, 2), np.float32)]},
            "frames['text'] has 1 videos, but frames['rgb'] has 2",
        ),
        (
            {"text": [np.zeros((3, 2), np.float32), np.zeros((4, 2), np.float32)]},
            "frames['text'][1] has 4 frames, but frames['rgb'][1] has 5",
        ),
        (
            {"rgb": [np.zeros((3, 4), np.uint8), np.zeros((5, 6), np.uint8)]},
            "frames['rgb'][1] has shape (5, 6); the file takes (T, 4)",
        ),
        (
            {"rgb": [np.zeros((3, 4), np.uint8), np.zeros((1, 5, 4), np.uint8)]},
            "frames['rgb'][1] has shape (1, 5, 4); the file takes (T, 4)",
        ),
        (
            {"rgb": [np.zeros((3, 4)), np.zeros((5, 4))]},
            "frames['rgb'][0] is float64; the file takes uint8",
        ),
    ],
)
def test_a_list_that_cannot_be_tagged_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=exactly(message)):
        padded(PORTS, videos_of(3, 5) | changes)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (
            one_video(sound=np.zeros((3, 1))),
            "videos[2] has ['rgb', 'sound', 'text']; the file's inputs are ['rgb', 'text']",
        ),
        (np.zeros((3, 4)), "videos[2] is ndarray; it must be frames by modality"),
        (
            one_video(text=np.zeros((3, 2))),
            "videos[2]['text'] is float64; the file takes float32",
        ),
        (
            one_video(text=np.zeros((2, 2), np.float32)),
            "videos[2]['text'] has 2 frames, but videos[2]['rgb'] has 3",
        ),
    ],
)
def test_a_video_that_cannot_be_tagged_is_refused_by_its_number(video, message):
    with pytest.raises(ValueError, match=exactly(message)):
        list(batches(PORTS, [one_video(), one_video(), video], 1000))


def test_a_ragged_list_is_no_array_of_frames():
    with pytest.raises(ValueError, match=r"^frames\['rgb'\]\[0\] is no array of frames: "):
        padded(PORTS, videos_of(2) | {"rgb": [[[1, 2], [3]]]})


def test_windows_of_a_video_that_cannot_be_tagged_are_refused(session):
    video = {"rgb": np.zeros((5, 7), np.uint8), "audio": np.zeros((3, 3), np.uint8)}

    for frames, message in (
        (video, "frames['audio'] has 3 frames, but frames['rgb'] has 5"),
        (None, "frames is NoneType; it must be frames by modality"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            next(session.run_windows(frames, window=2))


def test_what_is_neither_a_batch_nor_lists_is_refused(session):
    batch = {name: np.zeros((2, 3, width), np.uint8) for name, width in WIDTHS.items()}
    lists = {name: list(values) for name, values in batch.items()}

    for frames, num_frames, message in (
        (batch, None, "num_frames is missing; a padded batch needs it"),
        (lists, np.array([3, 3]), "num_frames is given; lists of videos have their own lengths"),
        (
            batch | {"rgb": lists["rgb"]},
            None,
            "frames has lists and arrays; give one of both for all modalities",
        ),
        (batch["rgb"], None, "frames is ndarray; it must be frames by modality"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=exactly(message)):
            session.run(frames, num_frames)
    assert list(session.run_in_batches([])) == []
