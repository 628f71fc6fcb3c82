import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit import average_checkpoints, export_onnx, fuse, import_onnx, select
from ensemble_kit.errors import OutputError, SizeLimitError
from ensemble_kit.files import format_size, parse_size, refuse_overwrite, sha256_of, written_aside
from ensemble_kit.report.page import write_report


def write(path, content, *, force, then=lambda: None):
    """Write a file aside; ``then`` happens before it is moved."""
    with written_aside(path, force=force) as aside:
        aside.write_bytes(content)
        then()


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1GiB", 2**30),
        ("1GB", 10**9),
        ("1gb", 10**9),
        ("995MiB", 995 * 2**20),
        ("995 MiB", 995 * 2**20),
        (" 4MB ", 4_000_000),
        ("1.5KiB", 1536),
        ("2kb", 2000),
        ("17B", 17),
        ("4000", 4000),
    ],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_size(text) == num_bytes


def test_a_size_is_the_same_in_another_process():
    size = pickle.loads(pickle.dumps(parse_size("4GiB")))

    assert (size, size.unit) == (2**32, "GiB")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1GiB",
        "0",
        "0MB",
        "0.1B",
        "1 GiB 2",
        "1TB",
        "1e9",
        "1,5GB",
        "a",
        "1.GB",
        "9" * 400,
        "9" * 25 + "GB",
    ],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SizeLimitError) as caught:
        parse_size(text)
    assert str(caught.value) == (
        f"{text[:80]!r} is not a size.\n"
        "Write a number and a unit: 1GiB (2^30 bytes), 1GB (10^9 bytes), 995MiB."
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (12_345, "12.1 KiB"),
        (1_042_356_088, "994.1 MiB"),
        (2**30, "1.0 GiB"),
        (2_084_700_000, "1.9 GiB"),
    ],
)
def test_sizes_are_written_for_people(num_bytes, text):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("limit", "num_bytes", "texts"),
    [
        ("10MB", 9_437_184, ("10.0 MB", "9.4 MB")),
        ("9.5mib", 9_437_184, ("9.5 MiB", "9.0 MiB")),
        ("1GB", 12_345, ("1.0 GB", "12.3 KB")),
        ("10000000", 9_437_184, ("9.5 MiB", "9.0 MiB")),
        ("500B", 17, ("500 bytes", "17 bytes")),
    ],
)
def test_a_limit_is_written_in_the_unit_that_was_typed_and_sizes_in_units_like_it(
    limit, num_bytes, texts
):
    size = parse_size(limit)

    assert (format_size(size), format_size(num_bytes, like=size)) == texts


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**40))
def test_whole_bytes_are_read_exactly(num_bytes):
    assert parse_size(str(num_bytes)) == num_bytes


def test_a_new_file_appears_whole_in_folders_that_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"

    with written_aside(path, force=False) as aside:
        aside.write_bytes(b"all")
        assert not path.exists()
        assert aside.parent == path.parent

    assert path.read_bytes() == b"all"
    assert os.listdir(path.parent) == ["file.bin"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    with pytest.raises(RuntimeError, match="half-way"):
        write(path, b"ne", force=True, then=lambda: fail(RuntimeError("half-way")))

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_an_existing_file_is_kept_without_force_and_replaced_with_it(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    with pytest.raises(OutputError) as caught, written_aside(path, force=False):
        pytest.fail("the block must not run")
    assert str(caught.value) == (
        f"{path} exists already.\nName another output, or replace it with --force."
    )
    assert path.read_bytes() == b"old"

    write(path, b"new", force=True)
    assert path.read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "file.bin"

    with pytest.raises(OutputError) as caught:
        write(path, b"mine", force=False, then=lambda: path.write_bytes(b"theirs"))

    assert caught.value.problem == f"{path} exists already."
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("output", ["file/output.bin", "file/folder/output.bin"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, output):
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / output

    with pytest.raises(OutputError) as caught, written_aside(path, force=False):
        pytest.fail("the block must not run")

    assert str(caught.value) == (
        f"{path} cannot be written: a file is in the place of its folder.\n"
        "Name a folder you may write to."
    )


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ensemble_kit.files.tempfile.mkstemp", refuse)  # root may write anywhere
    path = tmp_path / "file.bin"

    with pytest.raises(OutputError) as caught, written_aside(path, force=False):
        pytest.fail("the block must not run")

    assert str(caught.value) == (
        f"{path} cannot be written: Permission denied.\nName a folder you may write to."
    )


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    path = tmp_path / "file.bin"

    with pytest.raises(OutputError) as caught:
        write(path, b"so", force=False, then=lambda: fail(OSError(28, "No space left on device")))

    assert str(caught.value) == (
        f"{path} cannot be written: No space left on device.\n"
        "Free some space or name another folder; nothing was left half-written."
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_the_file_has_the_mode_that_the_umask_leaves(tmp_path, umask):
    path = tmp_path / "file.bin"
    before = os.umask(umask)
    try:
        write(path, b"", force=False)
        assert os.umask(umask) == umask  # and the mask itself is as it was
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_the_hash_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1

    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def refusal(path, *, force):
    with pytest.raises(OutputError) as caught, written_aside(path, force=force):
        pytest.fail("the block must not run")
    return str(caught.value)


def test_a_link_is_followed_so_that_the_file_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target.bin", tmp_path / "link.bin"
    target.write_bytes(b"old")
    link.symlink_to(target)

    assert refusal(link, force=False).startswith(f"{link} exists already.")
    write(link, b"new", force=True)

    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link.bin", "there"]


def test_a_link_to_nothing_is_written_through_with_force_alone(tmp_path):
    link = tmp_path / "link.bin"
    link.symlink_to(tmp_path / "missing.bin")

    assert refusal(link, force=False) == (
        f"{link} is a link to {tmp_path / 'missing.bin'}, which does not exist.\n"
        "Name another output, or write the file that it links to with --force."
    )
    write(link, b"new", force=True)

    assert link.is_symlink()
    assert (tmp_path / "missing.bin").read_bytes() == b"new"


def test_links_in_a_circle_are_one_error(tmp_path):
    link = tmp_path / "link.bin"
    link.symlink_to(link)

    assert refusal(link, force=True) == (
        f"{link} cannot be written: Too many levels of symbolic links.\n"
        "Name a folder you may write to."
    )


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "a pipe"), (make_socket, "a socket"), (os.mkdir, "a folder")],
    ids=["pipe", "socket", "folder"],
)
@pytest.mark.parametrize("is_linked", [False, True])
def test_what_is_no_file_is_not_replaced_even_with_force(make, kind, is_linked, tmp_path):
    path = tmp_path / "output"
    make(path)
    mode = path.stat().st_mode
    if is_linked:
        path = tmp_path / "link"
        path.symlink_to("output")

    assert refusal(path, force=True) == (
        f"{path} is {kind}, not a file.\nName a file; only files are replaced."
    )
    assert (tmp_path / "output").stat().st_mode == mode


def test_a_device_is_not_replaced_even_with_force(tmp_path):
    link = tmp_path / "null"
    link.symlink_to(os.devnull)  # asked about, never written

    with pytest.raises(OutputError) as caught:
        refuse_overwrite(link, force=True)

    assert str(caught.value) == (
        f"{link} is a device, not a file.\nName a file; only files are replaced."
    )


def test_a_name_that_no_file_system_allows_is_refused_before_the_work(tmp_path):
    write(tmp_path / ("ü" * 127 + "a"), b"all", force=False)
    path = tmp_path / ("ü" * 128)

    assert refusal(path, force=True) == (
        f"{path} has a name of 256 bytes; file systems allow 255.\nChoose a shorter name."
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from ensemble_kit.files import written_aside

with written_aside(Path(sys.argv[1]), force=False) as aside:
    aside.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed.bin")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    (tmp_path / ".mine.part").write_bytes(b"")  # another program's

    with written_aside(tmp_path / "one.bin", force=False) as one:
        one.write_bytes(b"1")
        write(tmp_path / "two.bin", b"2", force=False)  # one.bin is still being written

    assert sorted(os.listdir(tmp_path)) == [".mine.part", "one.bin", "two.bin"]
    assert (tmp_path / "one.bin").read_bytes() == b"1"


def test_the_file_is_flushed_then_renamed_then_its_folder_is_flushed(tmp_path, monkeypatch):
    flushed = []
    path = tmp_path / "file.bin"

    def fsync(handle):
        flushed.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))

    monkeypatch.setattr("ensemble_kit.files.os.fsync", fsync)
    write(path, b"all", force=False)

    assert flushed == [(False, False), (True, True)]


def test_standard_output_is_refused_where_a_file_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    for force in (False, True):
        with pytest.raises(OutputError) as caught, written_aside(Path("-"), force=force):
            pass

        assert str(caught.value) == (
            "- stands for standard output, but this file is read again after it is written.\n"
            "Name a file; only predict prints with -o -."
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (lambda output: average_checkpoints(["no.safetensors"], output), ".safetensors"),
        (lambda output: fuse("no.json", output), ".safetensors"),
        (lambda output: export_onnx("no.safetensors", output), ".onnx"),
        (
            lambda output: import_onnx("no.onnx", output, schema=None, name="a", inputs={}),
            ".safetensors",
        ),
        (lambda output: select(["no.csv"], output=output), ".json"),
        (lambda output: write_report("no.json", output), ".html"),
    ],
)
def test_a_file_is_not_written_under_the_suffix_of_another_format(write, suffix, tmp_path):
    with pytest.raises(OutputError) as caught:
        write(str(tmp_path / "a.txt"))

    assert str(caught.value) == (
        f"{tmp_path / 'a.txt'} does not end in {suffix}, the format that it would be written in.\n"
        f"Name a file that ends in {suffix}."
    )
    with pytest.raises(OutputError, match=r"^- stands for standard output, but "):
        write("-")
