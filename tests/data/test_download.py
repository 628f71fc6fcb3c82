"""Downloads from a local server that drops connections, sends wrong bytes, and is asked by two."""

import hashlib
import io
import shutil
import tarfile
import threading

import pytest
from youtube8m_site import NAMES, content, youtube8m_site

from ensemble_kit.data import download
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.download import download_audioset, download_youtube8m, numbered
from ensemble_kit.data.schema import read_schema
from ensemble_kit.errors import OutputError, RecordError

NUMBERED = ["train0000.tfrecord", "train0027.tfrecord", "train3187.tfrecord", "train3285.tfrecord"]
LABELS = "index,mid,display_name\n" + "".join(f'{n},/m/{n},"sound {n}"\n' for n in range(527))


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    with youtube8m_site() as site:
        yield site


def fetch(site, folder, **options):
    return download_youtube8m(
        folder, **({"partition": "2/frame/train", "base_url": site.url} | options)
    )


def records_of(folder):
    return sorted(path.name for path in folder.glob("*.tfrecord"))


def test_a_partition_comes_whole_with_its_schema_and_is_not_fetched_again(site, tmp_path):
    found = fetch(site, tmp_path)

    assert (found.num_files, found.num_new, found.num_bytes) == (4, 4, 1_600_000)
    assert records_of(tmp_path) == NUMBERED
    assert [(tmp_path / name).read_bytes() for name in NUMBERED] == list(map(content, NAMES))
    schema = read_schema(tmp_path / "schema.toml")
    assert schema == found.schema
    assert (schema.names[3861], schema.id_key, schema.level) == ("class 3861", "id", "frame")
    assert 'label_names = "vocabulary.csv"' in (tmp_path / "schema.toml").read_text()
    before = site.requests.copy()
    (tmp_path / NUMBERED[2]).write_bytes(b"damaged since")
    assert fetch(site, tmp_path).num_new == 1
    assert (tmp_path / NUMBERED[2]).read_bytes() == content(NAMES[2])
    new = site.requests - before
    assert new == {"/2/download_plans/frame_train.json": 1, f"/2/frame/train/{NAMES[2]}": 1}


@pytest.mark.parametrize(
    ("partition", "level", "id_key", "num_classes"),
    [
        ("1/video/train", "video", "video_id", 4716),
        ("1/video_level/train", "video", "video_id", 4716),
        ("2/video/train", "video", "id", 3862),
        ("3/frame/train", "frame", "id", 3862),
    ],
)
def test_each_version_and_level_has_its_schema(
    site, tmp_path, partition, level, id_key, num_classes
):
    schema = fetch(site, tmp_path, partition=partition).schema

    assert (schema.level, schema.id_key, schema.num_classes) == (level, id_key, num_classes)
    assert records_of(tmp_path) == NUMBERED
    if level == "video":
        assert [m.key for m in schema.modalities] == ["mean_rgb", "mean_audio"]
    other = "2/video/train" if level == "frame" else "2/frame/train"
    with pytest.raises(OutputError) as error:
        fetch(site, tmp_path, partition=other)
    assert error.value.problem == f"{tmp_path}/schema.toml describes other records."


def test_the_parts_are_those_of_the_official_downloader(site, tmp_path):
    names = []
    for part in (1, 2, 3):
        expected = {
            numbered(name)
            for name in NAMES
            if int(hashlib.md5(name.encode()).hexdigest(), 16) % 3 == part - 1
        }
        if expected:
            fetch(site, tmp_path / str(part), shard=(part, 3))
            assert set(records_of(tmp_path / str(part))) == expected
        else:
            with pytest.raises(RecordError, match=f"Part {part} of 3 of 4 files has none"):
                fetch(site, tmp_path / str(part), shard=(part, 3))
        names += expected
    assert sorted(names) == NUMBERED


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_dropped_connection_is_continued_where_it_stopped(site, tmp_path, knows_ranges):
    site.knows_ranges = knows_ranges
    site.answers[f"/2/frame/train/{NAMES[0]}"] = ["short", 503]
    fetch(site, tmp_path)

    assert (tmp_path / NUMBERED[0]).read_bytes() == content(NAMES[0])
    assert site.ranges == ([200_000] if knows_ranges else [])


def test_what_stopped_is_continued_by_the_next_command(site, tmp_path):
    path = f"/2/frame/train/{NAMES[1]}"
    site.answers[path] = ["short", 500, 500, 500, 500]
    with pytest.raises(RecordError) as error:
        fetch(site, tmp_path)
    assert str(error.value) == (
        f"1 of 4 files could not be fetched; the first: {site.url}{path} cannot be fetched: the "
        "server answers 500 Internal Server Error.\n"
        "Run the same command again: what is whole is kept, and the rest is continued."
    )
    assert records_of(tmp_path) == [NUMBERED[0], *NUMBERED[2:]]

    found = fetch(site, tmp_path)

    assert (found.num_new, found.num_bytes, site.ranges) == (1, 200_000, [200_000])


def test_a_wrong_md5_is_fetched_again_and_never_kept(site, tmp_path):
    path = f"/2/frame/train/{NAMES[3]}"
    site.answers[path] = ["wrong"]
    fetch(site, tmp_path / "once")
    assert (tmp_path / "once" / NUMBERED[3]).read_bytes() == content(NAMES[3])

    site.answers[path] = ["wrong"] * 9
    with pytest.raises(RecordError, match=r"its MD5 is [0-9a-f]{32}, expected [0-9a-f]{32}"):
        fetch(site, tmp_path / "always")
    assert records_of(tmp_path / "always") == NUMBERED[:3]
    assert not list((tmp_path / "always").glob("*09*.download"))


def test_a_disk_that_is_too_small_is_refused_before_a_byte_comes(site, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)

    with pytest.raises(OutputError) as error:
        fetch(site, tmp_path)

    assert str(error.value) == (
        f"{tmp_path} has 1.4 MiB left, but 1.5 MiB are to come in 4 files.\n"
        "Free some space, name a folder on another disk, or ask for a smaller part."
    )
    assert not records_of(tmp_path)


def test_a_disk_that_fills_up_stops_with_what_is_whole(site, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(OutputError) as error:
        fetch(site, tmp_path)

    assert error.value.problem.endswith(" cannot be written: No space left on device.")
    assert not records_of(tmp_path)


def test_two_downloads_at_once_share_the_work(site, tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch(site, tmp_path, jobs=2)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 2
    assert sum(found.num_bytes for found in results) == 1_600_000
    assert all(site.requests[f"/2/frame/train/{name}"] == 1 for name in NAMES)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (b"<html>", "b'<html>'"),
        (b'{"files": {"../../x.tfrecord": "0"}}', "'../../x.tfrecord': '0'"),
        (b'{"files": ["a"]}', """b'{"files": ["a"]}'"""),
    ],
)
def test_a_plan_that_is_none_is_named(site, tmp_path, plan, problem):
    path = "/2/download_plans/frame_train.json"
    site.files[path] = plan

    with pytest.raises(RecordError) as error:
        fetch(site, tmp_path)

    assert error.value.problem == (
        f"{site.url}{path} is no plan of files with their MD5: {problem}."
    )


def test_what_is_not_published_is_named(site, tmp_path):
    for partition in ("4/frame/train", "2/frame", "2/frame/../../x"):
        with pytest.raises(RecordError, match="is no partition of YouTube-8M"):
            fetch(site, tmp_path, partition=partition)
    with pytest.raises(RecordError) as error:
        fetch(site, tmp_path, partition="2/frame/test")
    assert error.value.problem == (
        f"{site.url}/2/download_plans/frame_test.json cannot be fetched: the server answers 404 "
        "Not Found."
    )


def archive(names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            packed.addfile(member, io.BytesIO(b"abc"))
    return buffer.getvalue()


def test_audiosets_archive_is_fetched_once_and_unpacked_safely(site, tmp_path):
    splits = ("bal_train", "unbal_train", "eval")
    names = [f"audioset_v1_embeddings/{split}/--.tfrecord" for split in splits]
    strangers = ["../../evil.tfrecord", "/evil.tfrecord", "audioset_v1_embeddings/eval/x.sh"]
    site.files["/features/features.tar.gz"] = archive([*names, *strangers])
    site.files["/csv/class_labels_indices.csv"] = LABELS.encode()
    folder = tmp_path / "deep" / "audioset"

    found = download_audioset(folder, base_url=site.url)

    assert (found.num_files, found.num_new) == (3, 3)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert [name for name in files if not name.endswith(".lock")] == sorted(
        [f"deep/audioset/{split}/--.tfrecord" for split in splits]
        + [f"deep/audioset/{name}" for name in
           ("class_labels_indices.csv", "features.tar.gz", "schema.toml")]
    )  # fmt: skip
    assert Records([folder / "eval"]).schema.names[526] == "sound 526"
    assert download_audioset(folder, base_url=site.url).num_new == 0
    assert site.requests["/features/features.tar.gz"] == 1


def test_an_archive_of_something_else_leaves_nothing_unpacked(site, tmp_path):
    for number, held in enumerate((archive(["a/eval/x.tfrecord"]), b"nothing of the kind")):
        site.files["/features/features.tar.gz"] = held
        site.files["/csv/class_labels_indices.csv"] = LABELS.encode()
        with pytest.raises(RecordError, match=r"holds no records in bal_train/|is damaged"):
            download_audioset(tmp_path / str(number), base_url=site.url)
        assert not list((tmp_path / str(number)).glob("*/"))
