"""Records at a URL: in memory, on a web server that misbehaves, on a local S3 server."""

import gzip
import os
import threading
import time
from io import FileIO
from pathlib import Path

import fsspec
import pytest
from builders import tiny_recipe, write_checkpoint
from web_site import Site

from ensemble_kit.data import remote
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.remote import ahead, find_shards, open_ready, origin_of, ready
from ensemble_kit.data.tfrecord import is_gzipped_records, write_records
from ensemble_kit.errors import OutputError, RecordError
from ensemble_kit.gzipped import GZIP
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.shards import predict_shards
from ensemble_kit.training.plan import RunPlan

IDS = [f"v{number}" for number in range(11)]
GIB = 2**30


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def bucket(folder):
    """The folder's files in a file system in memory, at memory://bucket."""
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        if path.is_file():
            files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield files
    files.rm("/bucket", recursive=True)


@pytest.fixture
def site(folder):
    files = {f"/{path.name}": path.read_bytes() for path in folder.glob("*.*")}
    site = Site(files, knows_ranges=False)
    yield site
    site.close()


def ids(records):
    return [video.id for video in records.videos()]


def test_records_at_a_url_are_those_of_the_files(bucket, folder, cache):
    here, there = Records([folder]), Records(["memory://bucket"], cache=cache)

    assert there.patterns == ("memory://bucket",)
    assert there.schema == here.schema
    assert there.count() == 11
    assert ids(there) == IDS
    for batch, same in zip(there.batches(4), here.batches(4), strict=True):
        assert batch.ids == same.ids
        assert all((batch.frames[name] == same.frames[name]).all() for name in same.frames)


def test_the_schemas_file_of_label_names_comes_with_it(bucket, cache):
    text = bucket.cat_file("/bucket/schema.toml").decode()
    bucket.pipe_file("/bucket/schema.toml", f'label_names = "names.csv"\n{text}'.encode())
    bucket.pipe_file("/bucket/names.csv", b"index,name\n" + b"".join(
        f"{index},n{index}\n".encode() for index in range(6)
    ))  # fmt: skip

    assert Records(["memory://bucket"], cache=cache).schema.names[5] == "n5"


def test_training_reads_the_same_order_through_a_cache_that_holds_one_shard(bucket, folder, cache):
    largest = max(path.stat().st_size for path in folder.glob("*.tfrecord"))
    here = Records([folder])
    there = Records(["memory://bucket/*.tfrecord"], cache=cache, cache_bytes=largest)

    order = [
        [name for batch in records.training_batches(3, seed=5, epochs=2) for name in batch.ids]
        for records in (here, there)
    ]

    assert order[0] == order[1]
    assert sorted(order[1]) == sorted(IDS * 2)


def test_a_shard_lies_at_a_place_that_says_its_url_and_version(bucket, cache):
    first, *_ = find_shards("memory://bucket/train0.tfrecord", cache=cache, cache_bytes=GIB)

    assert first.parent == cache / "memory" / "bucket"
    assert first.name.startswith("train0.")
    assert first.suffix == ".tfrecord"
    assert origin_of(first).url == "memory://bucket/train0.tfrecord"
    assert not first.exists()
    assert ready(first).read_bytes() == bucket.cat_file("/bucket/train0.tfrecord")


def test_a_cache_drops_what_was_used_longest_ago(bucket, cache):
    content = bucket.cat_file("/bucket/train0.tfrecord")
    for number in range(3):
        bucket.pipe_file(f"/bucket/train{number}.tfrecord", content)
    shards = find_shards("memory://bucket", cache=cache, cache_bytes=2 * len(content))
    for moment, shard in enumerate(shards[:2]):
        os.utime(ready(shard), (moment, moment))

    ready(shards[0])  # used again
    ready(shards[2])

    assert [shard.exists() for shard in shards] == [True, False, True]


def test_a_shard_larger_than_the_cache_is_refused_and_drops_none(bucket, cache):
    small, large = (bucket.size(f"/bucket/train{number}.tfrecord") for number in (1, 0))
    shards = find_shards("memory://bucket", cache=cache, cache_bytes=small)
    ready(shards[1])

    with pytest.raises(RecordError) as caught:
        ready(shards[0])

    assert str(caught.value) == (
        f"memory:///bucket/train0.tfrecord takes {large} bytes, but the cache may hold {small} "
        "bytes.\nName a folder on a larger disk with --cache, or raise --cache-size."
    )
    assert shards[1].exists()


def test_a_shard_that_was_cut_in_the_cache_is_fetched_again(bucket, cache):
    (shard,) = find_shards("memory://bucket/train0.tfrecord", cache=cache, cache_bytes=GIB)
    whole = ready(shard).read_bytes()
    shard.write_bytes(whole[:10])

    assert ready(shard).read_bytes() == whole


def test_a_shard_that_the_cache_drops_before_it_is_open_is_fetched_again(
    bucket, cache, monkeypatch
):
    (shard,) = find_shards("memory://bucket/train0.tfrecord", cache=cache, cache_bytes=GIB)
    drops = [1, 1]

    def ready_and_dropped(path):
        ready(path)
        if drops:
            drops.pop()
            path.unlink()
        return path

    monkeypatch.setattr(remote, "ready", ready_and_dropped)

    with open_ready(shard, FileIO) as file:
        assert file.read() == bucket.cat_file("/bucket/train0.tfrecord")
    with pytest.raises(FileNotFoundError):
        open_ready(cache / "no.tfrecord", FileIO)


def test_a_shard_that_changed_is_refused_and_taken_again_by_the_next_reading(bucket, cache):
    (old,) = find_shards("memory://bucket/train1.tfrecord", cache=cache, cache_bytes=GIB)
    bucket.pipe_file("/bucket/train1.tfrecord", bucket.cat_file("/bucket/train0.tfrecord"))

    with pytest.raises(RecordError) as caught:
        ready(old)
    (new,) = find_shards("memory://bucket/train1.tfrecord", cache=cache, cache_bytes=GIB)

    assert str(caught.value) == (
        "memory://bucket/train1.tfrecord has changed since the reading began.\n"
        "Start again, and leave the records as they are while they are read."
    )
    assert new != old
    assert ready(new).read_bytes() == bucket.cat_file("/bucket/train0.tfrecord")


def test_a_shard_that_vanished_is_named(bucket, cache):
    records = Records(["memory://bucket"], cache=cache)
    bucket.rm_file("/bucket/train2.tfrecord")

    with pytest.raises(RecordError) as caught:
        ids(records)

    assert str(caught.value) == (
        "memory:///bucket/train2.tfrecord does not exist.\n"
        "Check the URL, and that this machine may read it."
    )


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("memory://bucket/no.tfrecord", "memory://bucket/no.tfrecord does not exist."),
        ("memory://bucket/no*", "memory://bucket/no* matches no file."),
        ("nothing://bucket", "nothing://bucket cannot be read: Protocol not known: nothing."),
    ],
)
def test_a_url_that_leads_nowhere_is_named(bucket, cache, url, problem):
    with pytest.raises(RecordError) as caught:
        Records([url], cache=cache)

    assert str(caught.value) == f"{problem}\nCheck the URL, and that this machine may read it."


def test_a_protocol_whose_package_is_missing_names_it(cache, monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)

    with pytest.raises(RecordError) as caught:
        Records(["s3://bucket/train"], cache=cache)

    assert str(caught.value) == (
        "s3://bucket/train needs a package that is not installed: Install s3fs to access S3.\n"
        "Install it: pip install s3fs."
    )


def test_a_web_server_that_is_busy_twice_is_asked_again(site, cache):
    shard = "/train0.tfrecord"
    records = Records([site.url + shard], schema=None, cache=cache)
    assert site.requests[shard] == 0
    site.answers[shard] = [503, 503]

    assert ids(records) == IDS[:4]
    assert site.requests[shard] == 3
    assert ids(records) == IDS[:4]
    assert site.requests[shard] == 3  # the second reading is the cache's


@pytest.mark.parametrize("pattern", ["/train0.tfrecord", "/*.tfrecord"])
def test_a_web_server_that_does_not_answer_is_not_one_without_the_file(site, cache, pattern):
    site.close()

    with pytest.raises(RecordError) as caught:
        Records([site.url + pattern], cache=cache)

    assert caught.value.problem.startswith(f"{site.url}{pattern} cannot be fetched: ")


def test_a_web_server_without_etags_says_when_a_file_has_changed(site, cache):
    shard = f"{site.url}/train0.tfrecord"
    site.changed = "Sun, 29 Nov 2026 10:00:00 GMT"
    (before,) = find_shards(shard, cache=cache, cache_bytes=GIB)
    (same,) = find_shards(shard, cache=cache, cache_bytes=GIB)
    site.changed = "Sun, 29 Nov 2026 10:00:01 GMT"  # as large as it was
    (after,) = find_shards(shard, cache=cache, cache_bytes=GIB)

    assert before == same != after
    with pytest.raises(RecordError, match="has changed since the reading began"):
        ready(before)


def test_a_folder_of_a_web_server_ends_in_a_slash(site, cache):
    links = "".join(f'<a href="{path[1:]}">{path}</a>' for path in site.files)
    site.files["/"] = links.encode()

    assert ids(Records([f"{site.url}/"], cache=cache)) == IDS


def test_a_shard_that_comes_short_is_fetched_again_and_never_kept(site, cache):
    shard = "/train0.tfrecord"
    records = Records([site.url + shard], cache=cache)
    site.answers[shard] = ["short"]
    assert ids(records) == IDS[:4]

    shard = "/train1.tfrecord"
    records = Records([site.url + shard], cache=cache)
    site.answers[shard] = ["short"] * remote.ATTEMPTS
    with pytest.raises(RecordError) as caught:
        ids(records)

    assert str(caught.value).startswith(f"{site.url}{shard} cannot be fetched: ")
    assert str(caught.value).endswith(
        "\nSee that this machine may read it, or try again later; what was fetched before is kept "
        "in the cache."
    )
    assert [path.name for path in cache.rglob("train1*") if path.suffix == ".tfrecord"] == []
    assert list(cache.rglob("*.part")) == []


def test_the_next_shards_are_fetched_while_one_is_read(site, cache):
    urls = [f"/train{number}.tfrecord" for number in range(3)]
    shards = [
        path for url in urls for path in find_shards(site.url + url, cache=cache, cache_bytes=GIB)
    ]
    coming = ahead(shards)

    first = next(coming)

    until = time.monotonic() + 20
    while sum(site.requests[url] for url in urls) < 1 + remote.AHEAD:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert first == shards[0]
    assert list(coming) == shards[1:]
    assert [site.requests[url] for url in urls] == [1, 1, 1]


def test_shards_that_the_cache_has_dropped_are_fetched_ahead_in_a_later_epoch(bucket, cache):
    records = Records(["memory://bucket/*.tfrecord"], cache=cache)
    batches = records.training_batches(len(IDS), seed=0, epochs=2)
    next(batches)
    for path in records.paths:
        path.unlink()

    batches = records.training_batches(1, seed=1, epochs=1)
    next(batches)  # a record of one shard

    assert all(path.exists() for path in records.paths)


def test_predictions_keep_the_url_and_its_version_and_are_continued_by_them(
    bucket, tmp_path, cache
):
    def predict(where):
        records = Records(["memory://bucket"], cache=where)
        if not (tmp_path / "model.safetensors").exists():
            write_checkpoint(tmp_path / "model.safetensors", tiny_recipe(), records.schema)
        done = predict_shards(tmp_path / "model.safetensors", records, tmp_path / "out")
        return done.num_predicted, done.num_skipped

    assert predict(cache) == (3, 0)
    (tmp_path / "out" / "train1.safetensors").unlink()
    assert predict(tmp_path / "other") == (1, 2)
    assert len(list((tmp_path / "other").rglob("*.tfrecord"))) == 1  # what is there is not fetched
    shard = read_predictions(tmp_path / "out" / "train1.safetensors").metadata.shard
    (path,) = find_shards("memory://bucket/train1.tfrecord", cache=cache, cache_bytes=GIB)
    assert shard.url == "memory:///bucket/train1.tfrecord"
    assert shard.content == f"{origin_of(path).num_bytes}:{origin_of(path).version}"
    bucket.pipe_file("/bucket/train1.tfrecord", bucket.cat_file("/bucket/train0.tfrecord"))
    with pytest.raises(OutputError) as caught:
        predict(cache)
    assert caught.value.problem == (
        f"{tmp_path / 'out' / 'train1.safetensors'} exists already, and was made from other "
        "records."
    )


def test_a_run_is_the_same_by_url_and_version_whatever_the_cache(bucket, tmp_path, cache):
    def settings(where):
        records = Records(["memory://bucket"], cache=where)
        return RunPlan(
            recipe=tiny_recipe(), training=records, validation=None, folder=tmp_path / "run"
        ).settings()

    before = settings(cache)
    assert settings(tmp_path / "other") == before
    bucket.pipe_file("/bucket/train1.tfrecord", bucket.cat_file("/bucket/train0.tfrecord"))
    after = settings(cache)
    assert [name for name in before if before[name] != after[name]] == ["training records"]


def test_two_threads_fetch_a_shard_once(site, cache):
    (shard,) = find_shards(f"{site.url}/train2.tfrecord", cache=cache, cache_bytes=GIB)

    threads = [threading.Thread(target=ready, args=[shard]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert shard.read_bytes() == site.files["/train2.tfrecord"]
    assert site.requests["/train2.tfrecord"] == 1


def test_processes_that_read_ahead_fetch_shards_too(site, folder, cache):
    urls = [f"{site.url}/train{number}.tfrecord" for number in range(3)]

    batches = Records(urls, cache=cache).training_batches(3, seed=1, epochs=1, workers=2)
    same = Records([folder]).training_batches(3, seed=1, epochs=1)

    assert [batch.ids for batch in batches] == [batch.ids for batch in same]


def test_s3_is_read_through_its_own_package(folder, cache, monkeypatch):
    from moto import server

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("bucket")
        for path in folder.iterdir():
            files.pipe_file(f"bucket/train/{path.name}", path.read_bytes())

        records = Records(["s3://bucket/train/*.tfrecord"], cache=cache)

        assert ids(records) == IDS
        assert origin_of(records.paths[0]).version.strip('"') == files.info(
            "bucket/train/train0.tfrecord"
        )["ETag"].strip('"')
    finally:
        running.stop()


def test_a_path_that_is_no_shard_of_a_cache_is_left_alone(folder, tmp_path):
    path = folder / "train0.tfrecord"
    Path(f"{path}.json").write_text('{"mine": 1}')

    assert ready(path) == path
    assert ready(tmp_path / "no.tfrecord") == tmp_path / "no.tfrecord"


def pack(path, *, suffix=".gz"):
    """Replace a file by its gzipped form."""
    packed = path.with_name(path.name + suffix)
    packed.write_bytes(gzip.compress(path.read_bytes()))
    if suffix:
        path.unlink()
    return packed


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_gzipped_files_are_read_as_what_they_hold(folder, cache, suffix):
    here = list(Records([folder]).batches(4))
    order = [batch.ids for batch in Records([folder]).training_batches(4, seed=1, epochs=2)]
    for path in sorted(folder.glob("*.tfrecord"))[suffix == ".gz" :]:  # some, or all
        pack(path, suffix=suffix)

    packed = Records([folder], cache=cache)

    assert packed.schema.num_classes == 6  # that of the folder, not of the cache
    assert packed.count() == 11
    for batch, same in zip(packed.batches(4), here, strict=True):
        assert batch.ids == same.ids
        assert all((batch.frames[name] == same.frames[name]).all() for name in same.frames)
    again = Records([folder], cache=cache).training_batches(4, seed=1, epochs=2, workers=1)
    assert [batch.ids for batch in again] == order


def test_gzipped_files_at_a_url_are_read_too(bucket, folder, cache):
    for path in folder.glob("*.tfrecord"):
        bucket.rm(f"/bucket/{path.name}")
        bucket.pipe_file(f"/bucket/{path.name}.gz", gzip.compress(path.read_bytes()))

    assert ids(Records(["memory://bucket"], cache=cache)) == IDS


def test_a_gzipped_file_that_changes_is_expanded_again(folder, cache):
    path = pack(folder / "train0.tfrecord")
    assert ids(Records([path], cache=cache)) == IDS[:4]
    path.write_bytes(gzip.compress((folder / "train1.tfrecord").read_bytes()))
    os.utime(path, ns=(1, 1))

    assert ids(Records([path], cache=cache)) == IDS[4:5]


def test_a_damaged_gzip_stream_is_named_and_leaves_nothing(folder, cache):
    path = pack(folder / "train0.tfrecord")
    path.write_bytes(path.read_bytes()[:-9])

    with pytest.raises(RecordError) as error:
        Records([path], cache=cache).count()

    assert error.value.problem.startswith(
        f"file://{path} cannot be read: its gzip stream is damaged ("
    )
    assert error.value.hint == "Copy the file again from where it is whole, or leave it out."
    assert not [each for each in cache.rglob("*") if ".tfrecord" in each.suffixes[-1:]]


def test_a_bomb_stops_at_the_size_of_the_cache(folder, cache):
    path = folder / "bomb.tfrecord.gz"
    path.write_bytes(gzip.compress(bytes(5_000_000)))

    with pytest.raises(RecordError) as error:
        Records([path], cache=cache, cache_bytes=2_000_000).count()

    assert error.value.problem == (f"file://{path} takes 2.0 MiB, but the cache may hold 1.9 MiB.")
    assert not list(cache.rglob("*.tfrecord"))


def test_a_record_whose_length_looks_like_gzip_is_no_gzip(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_records(path, [bytes(0x088B1F)], force=False)

    assert path.read_bytes().startswith(GZIP)
    assert not is_gzipped_records(path)
    assert is_gzipped_records(pack(path))
