from types import SimpleNamespace

import numpy as np
import pytest

from ensemble_kit.errors import ProviderError
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.inputs import checked_feed, run_session

PORTS = {
    "rgb": SimpleNamespace(type="tensor(uint8)", shape=["B", "T", 4]),
    "text": SimpleNamespace(type="tensor(float)", shape=["B", "T", 2]),
    "num_frames": SimpleNamespace(type="tensor(int64)", shape=["B"]),
    "draws_a": SimpleNamespace(type="tensor(float)", shape=["B", "R", 3]),
}


def feed_of(*, draws=None, counts=(5, 0), **frames):
    given = {"rgb": np.zeros((2, 5, 4), np.uint8), "text": np.zeros((2, 5, 2), np.float32)}
    tables = {"draws_a": np.zeros((2, 1, 3), np.float32)} if draws is None else draws
    counts = np.array(counts) if isinstance(counts, tuple | list) else counts
    return checked_feed(PORTS, {**given, **frames}, counts, tables)


def test_what_fits_is_passed_on():
    text = np.full((2, 5, 2), 3.5, np.float32)
    text[0, 4], text[1] = np.nan, np.inf  # padding

    feed = feed_of(text=text, counts=np.array([4, 0], np.int32))

    assert feed.keys() == PORTS.keys()
    assert feed["num_frames"].dtype == np.int64
    assert feed["num_frames"].tolist() == [4, 0]
    assert feed["text"] is text


def poisoned(value):
    text = np.zeros((2, 5, 2), np.float32)
    text[1, 3, 1] = value
    return text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sound": np.zeros((2, 5, 1))},
            "frames has ['rgb', 'sound', 'text']; the file's inputs are ['rgb', 'text']",
        ),
        ({"draws": {}}, "draws has []; the file's draws are ['a']"),
        (
            {"rgb": np.zeros((2, 5, 4), np.float64)},
            "frames['rgb'] is float64; the file takes uint8",
        ),
        (
            {"text": np.zeros((2, 5, 2), np.float64)},
            "frames['text'] is float64; the file takes float32",
        ),
        (
            {"rgb": np.zeros((5, 4), np.uint8)},
            "frames['rgb'] has shape (5, 4); the file takes (B, T, 4)",
        ),
        (
            {"rgb": np.zeros((2, 5, 3), np.uint8)},
            "frames['rgb'] has shape (2, 5, 3); the file takes (B, T, 4)",
        ),
        (
            {"rgb": np.zeros((0, 5, 4), np.uint8)},
            "frames['rgb'] holds 0 videos; at least 1 is needed",
        ),
        (
            {"rgb": np.zeros((2, 0, 4), np.uint8)},
            "frames['rgb'] holds 0 frames; at least 1 is needed",
        ),
        (
            {"text": np.zeros((2, 4, 2), np.float32)},
            "frames['text'] has 2 videos of 4 frames, but another modality has 2 of 5",
        ),
        ({"counts": (5,)}, "num_frames has shape (1,); for 2 videos it must be (2,)"),
        ({"counts": np.array(5)}, "num_frames has shape (); for 2 videos it must be (2,)"),
        ({"counts": (5.0, np.nan)}, "num_frames is float64; it must be integers"),
        ({"counts": (True, False)}, "num_frames is bool; it must be integers"),
        (
            {"counts": (5, 6)},
            "num_frames[1] is 6; it must be from 0 to 5, the frames of the batch",
        ),
        (
            {"counts": (-1, 5)},
            "num_frames[0] is -1; it must be from 0 to 5, the frames of the batch",
        ),
        (
            {"text": poisoned(np.nan), "counts": (5, 4)},
            "frames['text'] of video 1 holds NaN or infinity in frame 3",
        ),
        (
            {"text": poisoned(-np.inf), "counts": (5, 4)},
            "frames['text'] of video 1 holds NaN or infinity in frame 3",
        ),
        (
            {"draws": {"draws_a": np.zeros((2, 1, 3))}},
            "draws['a'] is float64; the file takes float32",
        ),
        (
            {"draws": {"draws_a": np.zeros((1, 1, 3), np.float32)}},
            "draws['a'] is for 1 video; there are 2",
        ),
        (
            {"draws": {"draws_a": np.zeros((2, 0, 3), np.float32)}},
            "draws['a'] holds 0 repeats; at least 1 is needed",
        ),
        (
            {"draws": {"draws_a": np.full((2, 1, 3), 1, np.float32)}},
            "draws['a'] holds numbers that are not in [0, 1)",
        ),
        (
            {"draws": {"draws_a": np.full((2, 1, 3), np.nan, np.float32)}},
            "draws['a'] holds numbers that are not in [0, 1)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        feed_of(**changes)

    assert str(caught.value) == message


def test_large_numbers_whose_sum_overflows_are_finite():
    text = np.full((2, 5, 2), 3e38, np.float32)

    assert feed_of(text=text)["text"] is text


@pytest.mark.parametrize("videos", [0, 2])
def test_an_exported_file_is_given_checked_inputs(videos, exported):
    ensemble = OnnxEnsemble(exported.path)
    frames = {"rgb": np.ones((videos, 3, 7), np.uint8), "audio": np.ones((videos, 3, 3), np.uint8)}

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        ensemble.run(frames, np.array([2.5] * videos))

    assert str(caught.value) == (
        "num_frames is float64; it must be integers"
        if videos
        else "frames['rgb'] holds 0 videos; at least 1 is needed"
    )
    with pytest.raises(ValueError, match=r"^the file's draws are not an input; repeats and"):
        ensemble.run(frames, np.array([2] * videos), repeats=0)


def test_what_onnx_runtime_says_while_it_runs_is_an_error_of_the_kit():
    def fail(outputs, feed):
        raise RuntimeError("Add node.\n 64 by 250.")

    with pytest.raises(ProviderError) as caught:
        run_session(SimpleNamespace(run=fail), ("p",), feed_of(), name="e.onnx")

    assert str(caught.value) == (
        "ONNX Runtime cannot run e.onnx on 2 videos: Add node. 64 by 250.\n"
        "Tag fewer videos at a time, and none longer than the records that its members were "
        "trained or imported with."
    )
