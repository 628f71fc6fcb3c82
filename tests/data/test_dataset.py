from collections import Counter

import numpy as np
import pytest
from example_bytes import frame_record

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import read_schema, write_schema
from ensemble_kit.data.tfrecord import BadRecord, write_records
from ensemble_kit.errors import RecordError

IDS = [f"v{number}" for number in range(11)]
ONE_FRAME = {"rgb": np.ones((1, 3), np.uint8), "audio": np.ones((1, 2), np.uint8)}
NAME_FILES = "Name TFRecord files that exist."


def ids_of(batches):
    return [name for batch in batches for name in batch.ids]


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def test_a_batch_holds_each_video_and_zeros_up_to_the_longest(folder):
    records = Records([folder])
    videos = list(records.videos())

    batches = list(records.batches(4))

    assert [len(batch.ids) for batch in batches] == [4, 4, 3]
    assert ids_of(batches) == IDS
    assert {batch.labels.num_videos for batch in batches} == {4, 3}
    for start, batch in zip((0, 4, 8), batches, strict=True):
        own = videos[start : start + 4]
        assert batch.num_frames.tolist() == [video.num_frames for video in own]
        assert batch.num_frames.dtype == np.int64
        for name, width in (("rgb", 3), ("audio", 2)):
            frames = batch.frames[name]
            assert frames.dtype == np.uint8
            assert frames.shape == (len(own), max(batch.num_frames), width)
            for row, video in zip(frames, own, strict=True):
                for t in range(len(row)):
                    expected = video.frames[name][t] if t < video.num_frames else [0] * width
                    assert row[t].tolist() == list(expected)
        for row, video in enumerate(own):
            assert batch.labels.rows(row, row + 1).classes.tolist() == video.classes.tolist()


def test_files_may_be_named_by_folder_glob_or_name_and_are_read_once(folder):
    deep = folder / "deep" / "er"
    deep.mkdir(parents=True)
    (deep / "--.tfrecord").write_bytes((folder / "train1.tfrecord").read_bytes())
    bracketed = folder / "[a].tfrecord"
    bracketed.write_bytes((folder / "train1.tfrecord").read_bytes())

    def names(*patterns):
        return [path.name for path in Records(patterns).paths]

    shards = ["train0.tfrecord", "train1.tfrecord", "train2.tfrecord"]
    assert names(folder) == ["[a].tfrecord", *shards]
    assert names(f"{folder}/train*.tfrecord") == shards
    assert names(f"{folder}/**/--.tfrecord") == ["--.tfrecord"]
    assert names(f"{deep}/*.tfrecord") == ["--.tfrecord"]
    assert names(bracketed) == ["[a].tfrecord"]
    bracketed_folder = folder / "[b]"
    bracketed_folder.mkdir()
    bracketed.rename(bracketed_folder / "c.tfrecord")
    assert names(bracketed_folder) == ["c.tfrecord"]
    assert names(folder / shards[2], f"{folder}/train*") == [shards[2], *shards[:2]]


def test_patterns_are_kept_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)

    records = Records(["train*.tfrecord", "--.tfrecord/../train0.tfrecord"])

    assert records.patterns == (f"{folder}/train*.tfrecord", f"{folder}/train0.tfrecord")
    assert [path.is_absolute() for path in records.paths] == [True] * 3


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("no*.tfrecord", "matches no file"),
        ("no.tfrecord", "does not exist"),
        ("empty", "holds no *.tfrecord files"),
    ],
)
def test_a_pattern_without_files_is_an_error(folder, pattern, problem):
    (folder / "empty").mkdir()

    with pytest.raises(RecordError) as error:
        Records([folder, folder / pattern])

    assert str(error.value) == f"{folder / pattern} {problem}.\n{NAME_FILES}"


def test_the_schema_is_the_one_given_else_beside_else_above_else_of_the_first_record(
    folder, schema
):
    def with_classes(num_classes, path):
        path.parent.mkdir(exist_ok=True)
        changed = schema.model_copy(update={"num_classes": num_classes})
        write_schema(changed, path, force=True)
        return path

    path = folder / "below" / "a.tfrecord"
    write_records(path, [frame_record("v", [1], **ONE_FRAME)], force=False)
    given = with_classes(9, folder / "given.toml")

    assert Records([path], schema=given).schema.num_classes == 9
    assert Records([path], schema=read_schema(given)).schema.num_classes == 9
    with_classes(7, folder / "schema.toml")
    assert Records([path]).schema.num_classes == 7
    with_classes(8, path.with_name("schema.toml"))
    assert Records([path]).schema.num_classes == 8
    path.with_name("schema.toml").unlink()
    (folder / "schema.toml").unlink()
    assert Records([path]).schema == schema.model_copy(update={"num_classes": 3862})


def test_label_names_are_carried_by_the_schema(folder):
    names = folder / "names.csv"
    names.write_text("label_id,label_name\n" + "".join(f"{i},class {i}\n" for i in range(6)))

    assert Records([folder], label_names=names).schema.names[5] == "class 5"


def test_a_bad_record_is_an_error_unless_bad_ones_are_skipped_and_counted_once(folder):
    path = folder / "train1.tfrecord"
    bad = frame_record("bad", [6], **ONE_FRAME)
    good = frame_record("good", [5], **ONE_FRAME)
    write_records(path, [bad, good, bad], force=True)

    strict = Records([folder])
    with pytest.raises(BadRecord) as error:
        list(strict.videos())
    lenient = Records([folder], skip_bad_records=True)
    found = [video.id for _ in range(2) for video in lenient.videos()]

    assert str(error.value) == (
        f"{path}, record 1: label 6 is outside the 6 classes (0 to 5).\n"
        "Give a schema that says so, or leave the record out with --skip-bad-records."
    )
    assert found == 2 * [*IDS[:4], "good", *IDS[5:]]
    assert lenient.num_skipped == 2
    assert [error.number for error in lenient.skipped] == [1, 3]


def test_skipping_goes_on_after_a_bad_checksum_and_ends_a_file_at_a_bad_length(folder):
    damage(folder / "train0.tfrecord", 12)
    damage(folder / "train2.tfrecord", 0)
    records = Records([folder], skip_bad_records=True)

    found = [video.id for video in records.videos()]

    assert found == IDS[1:5]
    assert records.num_skipped == 2
    assert [error.path.name for error in records.skipped] == ["train0.tfrecord", "train2.tfrecord"]


def test_records_of_which_none_is_good_are_an_error(folder):
    schema = Records([folder]).schema
    for path in folder.glob("*.tfrecord"):
        damage(path, 0)
    records = Records([folder], schema=schema, skip_bad_records=True)

    with pytest.raises(RecordError) as error:
        next(records.batches(2))

    assert str(error.value) == (
        f"{folder}/train0.tfrecord: no record of 3 files can be read.\n"
        "Copy the files again from where they are whole."
    )


def test_checksums_may_be_left_unchecked(folder):
    damage(folder / "train0.tfrecord", 8)  # the checksum of the first length

    assert len(list(Records([folder], check_crc=False).videos())) == 11


def test_an_empty_file_is_an_error_even_where_bad_records_are_skipped(folder):
    (folder / "train1.tfrecord").write_bytes(b"")
    records = Records([folder], skip_bad_records=True)

    with pytest.raises(RecordError) as error:
        list(records.videos())

    assert str(error.value) == (
        f"{folder}/train1.tfrecord is empty.\n"
        "Copy the file again from where it is whole, or leave it out."
    )


def test_the_schema_is_told_from_the_first_record_that_is_whole(folder):
    (folder / "schema.toml").unlink()
    damage(folder / "train0.tfrecord", 0)

    records = Records([folder], skip_bad_records=True)

    assert records.schema.widths == {"rgb": 3, "audio": 2}
    assert records.num_skipped == 1


def test_the_record_that_tells_no_schema_is_named_by_its_own_number(folder):
    (folder / "schema.toml").unlink()
    path = folder / "train0.tfrecord"
    flow = frame_record("v", [1], flow=np.ones((1, 3), np.uint8))
    write_records(path, [flow, flow], force=True)
    damage(path, 12)

    with pytest.raises(RecordError) as error:
        Records([folder], skip_bad_records=True)

    assert str(error.value) == (
        f"{path}, record 2: its keys are of no known kind "
        "(found context id, labels; feature lists flow).\n"
        "Write a schema TOML for these records and name it with --schema."
    )


def test_files_without_one_whole_record_are_an_error(folder):
    (folder / "schema.toml").unlink()
    for path in folder.glob("*.tfrecord"):
        damage(path, 0)

    with pytest.raises(RecordError) as error:
        Records([folder], skip_bad_records=True)

    assert str(error.value) == (
        f"{folder}/train0.tfrecord: no record of 3 files can be read.\n"
        "Copy the files again from where they are whole."
    )


def test_records_are_counted_from_their_framing_alone(folder):
    damage(folder / "train0.tfrecord", 12)

    assert Records([folder]).count() == 11


def test_what_is_read_of_a_video_depends_on_neither_shards_nor_batches(folder, schema):
    joined = folder / "joined"
    content = b"".join(path.read_bytes() for path in Records([folder]).paths)
    joined.mkdir()
    (joined / "all.tfrecord").write_bytes(content)

    def read(pattern, batch_size):
        return {
            name: (
                int(num_frames),
                [batch.frames[m.name][row][:num_frames].tolist() for m in schema.modalities],
                batch.labels.rows(row, row + 1).classes.tolist(),
            )
            for batch in Records([pattern]).batches(batch_size)
            for row, (name, num_frames) in enumerate(zip(batch.ids, batch.num_frames, strict=True))
        }

    assert read(folder, 3) == read(joined, 11) == read(joined, 1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_processes_share_the_batches_in_turn(num_ranks, folder):
    records = Records([folder])
    whole = [batch.ids for batch in records.batches(4)]
    assert len(whole) > 2

    for rank in range(num_ranks):
        shared = [batch.ids for batch in records.batches(4, rank=rank, num_ranks=num_ranks)]
        assert shared == whole[rank::num_ranks]


def test_records_without_a_labels_key_can_be_tagged_but_not_learnt_from(folder):
    labelled = Records([folder])
    other = labelled.schema.model_copy(update={"labels_key": "classes"})

    tagged = list(Records([folder], schema=other, needs_labels=False).videos())

    assert [video.id for video in tagged] == IDS
    assert all(video.classes.size == 0 for video in tagged)
    with pytest.raises(RecordError, match="'classes'"):
        list(Records([folder], schema=other).videos())


def test_a_video_of_a_rare_class_comes_more_often_where_records_are_balanced(schema, tmp_path):
    classes = [[0]] * 4 + [[0, 1]]  # the last one's rarest class has one video of five
    for number, own in enumerate(classes):
        write_records(
            tmp_path / f"{number}.tfrecord",
            [frame_record(f"v{number}", own, **ONE_FRAME)],
            force=False,
        )
    write_records(tmp_path / "5.tfrecord", [frame_record("bad", [9], **ONE_FRAME)], force=False)
    records = Records([tmp_path], schema=schema, skip_bad_records=True)

    def counts(balance):
        batches = records.training_batches(4, seed=0, epochs=90, balance=balance)
        return Counter(ids_of(batches))

    # Of six records five have a class 0, whose rarity is 6 / 5; the bad one counts as 1.
    shares = np.array([6 / 5] * 4 + [6]) * 6 / (4 * 6 / 5 + 6 + 1)
    found = [counts(1.0)[f"v{number}"] / 90 for number in range(5)]
    assert found == pytest.approx(shares, abs=0.1)
    assert set(counts(None).values()) == {90}
