import numpy as np
import pytest

from ensemble_kit.data.batch import BatchLayout, Collator, Memory, collate
from ensemble_kit.data.decode import Video
from ensemble_kit.data.frame_choice import Chosen
from ensemble_kit.data.schema import Modality

CHOSEN = [
    Chosen(np.array(rows), np.arange(1.0, 1 + len(rows)))
    for rows in ([1], [0, 2], [3], [1, 5], [0, 2, 3], [4])
]


@pytest.fixture
def mixed(schema):
    """Bytes 3 wide and floats 2 wide."""
    flow = Modality(name="flow", key="flow", width=2, value_type="float32")
    return schema.model_copy(update={"modalities": (schema.modalities[0], flow)})


def videos_of(lengths):
    random = np.random.default_rng(0)
    return [
        Video(
            f"v{number}",
            np.arange(number),
            {
                "rgb": random.integers(1, 256, (length, 3), np.uint8),
                "flow": random.standard_normal((length, 2), np.float32),
            },
        )
        for number, length in enumerate(lengths)
    ]


def expected_rows(values, rows, length):
    return [list(values[t]) for t in rows] + [[0] * values.shape[1]] * (length - len(rows))


def written(layout, videos, chosen, **guess):
    """What a collator makes of videos in memory that was used before."""
    memory = np.full(layout.num_bytes, 255, np.uint8)
    collator = Collator(layout, memory, **guess)
    for video, own in zip(videos, chosen, strict=True):
        collator.add(video, own)
    return layout.batch(memory, collator.finish(), epoch=7)


@pytest.mark.parametrize("num_frames", [5, 8])  # as many as the longest has, and more
@pytest.mark.parametrize("num_videos", [3, 4])
def test_videos_of_any_length_end_up_side_by_side_with_zeros_after(mixed, num_videos, num_frames):
    videos = videos_of([2, 5, 1])
    layout = BatchLayout(mixed, num_videos=num_videos, num_frames=num_frames, is_weighted=False)

    batch = written(layout, videos, [None] * 3)

    assert batch.ids == ("v0", "v1", "v2")
    assert batch.num_frames.tolist() == [2, 5, 1]
    assert batch.num_frames.dtype == np.int64
    assert batch.frame_weights is None
    assert batch.epoch == 7
    for name, dtype in (("rgb", np.uint8), ("flow", np.float32)):
        assert batch.frames[name].dtype == dtype
        assert batch.frames[name].flags.c_contiguous
        for row, video in zip(batch.frames[name], videos, strict=True):
            values = video.frames[name]
            assert row.tolist() == expected_rows(values, range(len(values)), 5)
    assert [batch.labels.rows(i, i + 1).classes.tolist() for i in range(3)] == [[], [0], [0, 1]]


@pytest.mark.parametrize("guess", [1, 2, 3, 6, None])
def test_chosen_frames_are_copied_with_their_weights_whatever_was_guessed(mixed, guess):
    videos = videos_of([2, 4, 5, 6, 4, 5])
    layout = BatchLayout(mixed, num_videos=6, num_frames=6, is_weighted=True)

    batch = written(layout, videos, CHOSEN, num_frames=guess)

    one, two, three = [1, 0, 0], [1, 2, 0], [1, 2, 3]
    assert batch.num_frames.tolist() == [1, 2, 1, 2, 3, 1]
    assert batch.frame_weights.tolist() == [one, two, one, two, three, one]
    assert batch.frame_weights.dtype == np.float32
    for name in ("rgb", "flow"):
        for row, video, chosen in zip(batch.frames[name], videos, CHOSEN, strict=True):
            assert row.tolist() == expected_rows(video.frames[name], chosen.rows, 3)


def test_a_batch_may_be_empty(mixed):
    layout = BatchLayout(mixed, num_videos=2, num_frames=4, is_weighted=True)

    batch = written(layout, [], [])

    assert batch.ids == ()
    assert batch.frames["rgb"].shape == (0, 0, 3)
    assert batch.frame_weights.shape == (0, 0)
    assert batch.labels.num_videos == 0


def test_a_copy_shares_no_memory(mixed):
    layout = BatchLayout(mixed, num_videos=6, num_frames=6, is_weighted=True)
    batch = written(layout, videos_of([2, 4, 5, 6, 4, 5]), CHOSEN)

    copy = batch.copy()

    for name, frames in batch.frames.items():
        assert not np.shares_memory(copy.frames[name], frames)
        np.testing.assert_array_equal(copy.frames[name], frames)
    assert not np.shares_memory(copy.frame_weights, batch.frame_weights)
    np.testing.assert_array_equal(copy.frame_weights, batch.frame_weights)
    assert collate(videos_of([2]), mixed).copy().frame_weights is None


def test_memory_is_lent_again_when_nothing_of_a_batch_is_left_and_no_sooner():
    memory = Memory()
    lent = memory.lend(8)
    lent[:] = 7
    view = lent[2:6].view(np.int16).reshape(2, 1)
    del lent

    other = memory.lend(8)
    other[:] = 5
    assert view.tolist() == [[0x0707], [0x0707]]
    del view
    larger = memory.lend(9)  # two blocks are kept: the first is not
    assert len(larger) == 9
    del other
    assert memory.lend(6).tolist() == [5] * 8
