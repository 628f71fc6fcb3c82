"""Training batches read in this process; those read by others are equal to them."""

import errno
import subprocess
import sys
from io import FileIO
from itertools import islice

import numpy as np
import pytest
from example_bytes import byte_strings, frame_record, integers, record

from ensemble_kit.data import reading
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.frame_choice import Draws, FrameChoice
from ensemble_kit.data.order import RecordIndex, batch_plans
from ensemble_kit.data.reading import Source
from ensemble_kit.data.tfrecord import BadRecord, refuse, write_records
from ensemble_kit.errors import RecordError

IDS = [f"v{number}" for number in range(11)]
PUT_BACK = "Put the file back as it was, and leave the records as they are while they are read."
ONE_FRAME = {"rgb": np.ones((1, 3), np.uint8), "audio": np.ones((1, 2), np.uint8)}


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


class SlowFile(FileIO):
    """A file that gives a few bytes at a time, as systems may."""

    def readinto(self, buffer):
        return super().readinto(buffer[:7])


def source_of(paths, schema):
    return Source(
        tuple(paths),
        schema,
        check_crc=True,
        needs_labels=True,
        skips_bad=False,
        seed=0,
        choice=None,
    )


def index_of(paths):
    return RecordIndex(paths, check_crc=True, on_bad=refuse)


@pytest.mark.parametrize(("open_files", "file"), [(1, FileIO), (32, SlowFile)])
def test_batches_of_an_epoch_hold_what_the_records_hold(
    folder, schema, open_files, file, monkeypatch
):
    monkeypatch.setattr(reading, "FileIO", file)
    records = Records([folder])
    videos = {video.id: video for video in records.videos()}
    plans = batch_plans(index_of(records.paths), 4, seed=0, epochs=1)

    source = source_of(records.paths, schema)

    read = reading.read(source, plans, open_files=open_files, whole_bytes=0)

    batches = [batch for batch, _ in read]

    assert [len(batch.ids) for batch in batches] == [4, 4, 3]
    assert sorted(name for batch in batches for name in batch.ids) == sorted(IDS)
    for batch in batches:
        own = [videos[name] for name in batch.ids]
        assert batch.num_frames.tolist() == [video.num_frames for video in own]
        assert batch.frame_weights is None
        for row, video in enumerate(own):
            assert batch.labels.rows(row, row + 1).classes.tolist() == video.classes.tolist()
            for name in schema.widths:
                frames = batch.frames[name][row]
                assert len(frames) == max(batch.num_frames)
                np.testing.assert_array_equal(frames[: video.num_frames], video.frames[name])
                assert not frames[video.num_frames :].any()


def test_batches_run_on_into_the_next_epoch_and_say_which_it_is(folder):
    batches = list(islice(Records([folder]).training_batches(4, seed=0), 6))

    assert [len(batch.ids) for batch in batches] == [4] * 6
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1, 1, 2]
    names = [name for batch in batches for name in batch.ids]
    assert sorted(names[:11]) == sorted(names[11:22]) == sorted(IDS)
    assert names[:11] != names[11:22]


def test_a_run_is_taken_up_again_without_reading_what_it_has_had(folder, monkeypatch):
    records = Records([folder])
    whole = [batch.ids for batch in islice(records.training_batches(4, seed=0), 6)]
    num_read = []
    read = reading.RecordFiles.read_to
    monkeypatch.setattr(
        reading.RecordFiles, "read_to", lambda *place: num_read.append(1) or read(*place)
    )

    rest = list(islice(Records([folder]).training_batches(4, seed=0, start=3), 3))

    assert [batch.ids for batch in rest] == whole[3:]
    assert len(num_read) == 12


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("batch_size", [3, 5])
@pytest.mark.parametrize("is_unusual", [False, True])
def test_chosen_frames_are_those_of_the_video_s_own_turn(
    folder, schema, in_order, batch_size, is_unusual
):
    if is_unusual:  # more bytes than its frames need, so that their number cannot be told
        context = {
            "id": byte_strings(b"v4"),
            "labels": integers([1]),
            "more": byte_strings(b"x" * 99),
        }
        frames = {name: [byte_strings(b"abc"[:w])] * 2 for name, w in schema.widths.items()}
        write_records(folder / "train1.tfrecord", [record(context, frames)], force=True)
    records = Records([folder])
    videos = {video.id: video for video in records.videos()}
    choice = FrameChoice("random", 3, in_order)
    draws = Draws(seed=5)

    batches = list(records.training_batches(batch_size, seed=5, choice=choice, epochs=2))

    position = 0
    for batch in batches:
        assert batch.frames["rgb"].shape[1] == max(batch.num_frames)
        for row, name in enumerate(batch.ids):
            video, count = videos[name], batch.num_frames[row]
            epoch, place = divmod(position, 11)
            rows, weights = choice.take(draws.of(epoch, place, 3), video.num_frames)
            assert count == len(rows)
            assert batch.frame_weights[row].tolist() == [
                *weights,
                *[0] * (len(batch.frame_weights[row]) - count),
            ]
            for key, frames in video.frames.items():
                np.testing.assert_array_equal(batch.frames[key][row, :count], frames[rows])
                assert not batch.frames[key][row, count:].any()
            position += 1
    assert position == 22


def test_two_modalities_of_one_key_and_single_floats_find_room(tmp_path, schema):
    modality = schema.modalities[0].model_copy(update={"width": 1, "value_type": "float32"})
    twice = (modality, modality.model_copy(update={"name": "again"}))
    own = schema.model_copy(update={"modalities": twice})
    floats = [b"\x12\x05\x0d\x00\x00\x80\x3f"] * 200  # 1.0, not packed
    context = {"id": byte_strings(b"v"), "labels": integers([1])}
    write_records(tmp_path / "a.tfrecord", [record(context, {"rgb": floats})], force=False)

    (batch,) = Records([tmp_path], schema=own).training_batches(2, seed=0, epochs=1)

    assert batch.frames["again"].tolist() == [[[1.0]] * 200]


def test_bad_records_are_left_out_of_their_batch_and_counted_once(folder):
    path = folder / "train1.tfrecord"
    bad = frame_record("bad", [6], **ONE_FRAME)
    write_records(path, [bad, frame_record("good", [5], **ONE_FRAME), bad], force=True)
    damage(folder / "train0.tfrecord", 12)
    damage(folder / "train2.tfrecord", 0)
    schema = Records([folder]).schema

    with pytest.raises(BadRecord) as error:
        list(Records([path], schema=schema).training_batches(3, seed=0))
    lenient = Records([folder], skip_bad_records=True)
    batches = list(lenient.training_batches(6, seed=0, epochs=2))

    assert str(error.value).partition("\n")[0] == (
        f"{path}, record {error.value.number}: label 6 is outside the 6 classes (0 to 5)."
    )
    names = [name for batch in batches for name in batch.ids]
    assert sorted(names) == sorted(2 * [*IDS[1:4], "good"])  # 4 of 7 whose framing is whole
    assert len(batches) == 3
    assert [(bad.path.name, bad.number) for bad in lenient.skipped[:1]] == [("train2.tfrecord", 1)]
    assert sorted((bad.path.name, bad.number) for bad in lenient.skipped) == [
        ("train0.tfrecord", 1),
        ("train1.tfrecord", 1),
        ("train1.tfrecord", 3),
        ("train2.tfrecord", 1),
    ]


@pytest.mark.parametrize("place", [0, 12], ids=["framing", "payload"])
def test_an_epoch_without_a_good_record_is_an_error(tmp_path, schema, place):
    for name in ("a", "b"):
        path = tmp_path / f"{name}.tfrecord"
        write_records(path, [frame_record(name, [1], **ONE_FRAME)], force=False)
        damage(path, place)
    records = Records([tmp_path], schema=schema, skip_bad_records=True)

    with pytest.raises(RecordError) as error:
        list(records.training_batches(1, seed=0))

    assert str(error.value) == (
        f"{tmp_path}/a.tfrecord: no record of 2 files can be read.\n"
        "Copy the files again from where they are whole."
    )


def test_a_batch_of_bad_records_alone_is_empty_so_that_others_keep_their_numbers(folder):
    damage(folder / "train0.tfrecord", 12)
    records = Records([folder], skip_bad_records=True)

    batches = list(records.training_batches(1, seed=0, epochs=2))

    assert sorted(len(batch.ids) for batch in batches) == [0] * 2 + [1] * 20


def test_a_file_that_goes_or_shrinks_meanwhile_is_named(folder, schema):
    path = folder / "train2.tfrecord"
    paths = [path, folder / "train0.tfrecord"]
    index, source = index_of(paths), source_of(paths, schema)

    def batches(seed):  # of one file after the other
        plans = batch_plans(index, 1, seed=seed, shuffle_bytes=0)
        return reading.read(source, plans, open_files=1)

    firsts = {seed: next(batches(seed))[0].ids for seed in range(9)}
    seed = next(seed for seed, ids in firsts.items() if ids == ("v0",))

    vanished = batches(seed)
    next(vanished)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(RecordError) as gone:
        list(vanished)
    path.write_bytes(content[:-1])
    with pytest.raises(RecordError) as shrunk:
        list(batches(seed))

    assert str(gone.value) == (
        f"{path} cannot be read any more: No such file or directory.\n{PUT_BACK}"
    )
    assert str(shrunk.value) == (
        f"{path} has become shorter: it ends within record 6, which was whole when the reading "
        f"began.\n{PUT_BACK}"
    )


def test_more_ranks_than_videos_of_a_batch_are_refused(folder):
    with pytest.raises(RecordError) as error:
        Records([folder]).training_batches(3, seed=0, num_ranks=4)

    assert str(error.value) == (
        "A batch of 3 videos cannot be shared by 4 processes.\n"
        "Set training.batch_size to 4 or more, or start fewer processes."
    )


LIMITED = """
import resource, sys
from ensemble_kit.data import reading
from ensemble_kit.data.dataset import Records

reading.SMALL_FILE = 0  # none is read whole
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
records = Records([sys.argv[1]])
for workers in (0, 1):
    batches = records.training_batches(7, seed=0, epochs=1, workers=workers)
    print(sum(len(batch.ids) for batch in batches))
"""


def test_more_files_are_read_than_the_system_lets_a_process_open(tmp_path):
    for number in range(200):
        content = frame_record(f"v{number}", [0], **ONE_FRAME)
        write_records(tmp_path / f"{number:03}.tfrecord", [content], force=False)

    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert (result.stdout.split(), result.stderr) == (["200", "200"], "")


def test_where_other_files_leave_little_room_fewer_records_files_are_kept_open(
    folder, schema, monkeypatch
):
    opened = []

    class Scarce(FileIO):
        def __init__(self, path):
            if sum(not file.closed for file in opened) >= 2:
                raise OSError(errno.EMFILE, "Too many open files")
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr(reading, "FileIO", Scarce)
    paths = Records([folder]).paths
    plans = batch_plans(index_of(paths), 4, seed=0, epochs=1)

    read = list(reading.read(source_of(paths, schema), plans, whole_bytes=0))

    assert sorted(name for batch, _ in read for name in batch.ids) == sorted(IDS)
    assert len(opened) > 2


def test_small_files_are_read_once_as_far_as_there_is_room(folder, schema, monkeypatch):
    opened = []

    class Counted(FileIO):
        def __init__(self, path):
            super().__init__(path)
            opened.append(path)

    monkeypatch.setattr(reading, "FileIO", Counted)
    paths = Records([folder]).paths
    room = sum(path.stat().st_size for path in paths)
    for has_room in (True, False):
        whole_bytes = room if has_room else room // 3
        plans = batch_plans(index_of(paths), 4, seed=0, epochs=3)
        opened.clear()
        read = list(
            reading.read(source_of(paths, schema), plans, open_files=1, whole_bytes=whole_bytes)
        )

        assert sorted(name for batch, _ in read for name in batch.ids) == sorted(IDS * 3)
        assert (sorted(opened) == sorted(paths)) == has_room
