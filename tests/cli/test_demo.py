"""The demo, with quick commands in place of the real ones."""

import importlib
import json
import re
import shlex

import click
import pytest

from ensemble_kit.cli import main
from ensemble_kit.data import synthetic

demo = importlib.import_module("ensemble_kit.cli.demo")  # the package's name for it is a command
QUICK = (
    "ensemble-kit data synthesize data --train 3 --validate 2 --test 2",
    "ensemble-kit recipes copy demo/gru my.toml",
    "ensemble-kit recipes show my.toml",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(demo, "COMMANDS", QUICK)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "new"


def commands_in(output):
    return re.findall(r"^\$ (ensemble-kit .*)$", output, flags=re.MULTILINE)


def test_every_command_is_printed_and_run(runner, folder):
    result = runner.invoke(main, ["demo", str(folder)])

    assert result.exit_code == 0, result.output
    assert commands_in(result.stdout) == list(QUICK)
    assert result.stdout.startswith(f"$ mkdir -p {folder} && cd {folder}\n")
    assert re.search(rf"\nDone in \d+ s\. All files are in {folder}\.\n", result.stdout)
    assert result.stdout.endswith(f"{demo.NEXT}\n")
    assert (folder / "my.toml").is_file()


def test_json_is_all_that_standard_output_has(runner, folder):
    result = runner.invoke(main, ["demo", str(folder), "--json"])

    assert result.exit_code == 0, result.output
    assert commands_in(result.stderr) == [f"{line} --json" for line in QUICK]
    decoder, rest, printed = json.JSONDecoder(), result.stdout.strip(), []
    while rest:
        value, end = decoder.raw_decode(rest)
        printed.append(value)
        rest = rest[end:].strip()
    assert len(printed) == 3
    assert printed[1] == {"path": "my.toml", "recipe": "demo/gru"}


def stop(*_, **__):
    raise KeyboardInterrupt


def test_the_same_command_resumes_a_demo_that_was_stopped_in_its_first_command(
    runner, folder, monkeypatch
):
    whole = synthetic.write_records
    written = []

    def write_and_stop(path, *arguments, **options):
        whole(path, *arguments, **options)
        written.append(path)
        stop()

    with monkeypatch.context() as patched:
        patched.setattr(synthetic, "write_records", write_and_stop)
        stopped = runner.invoke(main, ["demo", str(folder)])

    resumed = runner.invoke(main, ["demo", str(folder)])

    assert stopped.exit_code == 130
    assert len(written) == 1
    assert resumed.exit_code == 0, resumed.output
    assert commands_in(resumed.stdout) == [f"{QUICK[0]} --force", *QUICK[1:]]


def test_the_same_command_resumes_a_demo_after_the_commands_that_had_finished(
    runner, folder, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr("ensemble_kit.recipes.reading.load_recipe", stop)
        stopped = runner.invoke(main, ["demo", str(folder)])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tfrecord")}
    monkeypatch.setattr(demo, "COMMANDS", (*QUICK[:2], QUICK[1]))

    resumed = runner.invoke(main, ["demo", str(folder)])

    assert stopped.exit_code == 130
    assert resumed.exit_code == 0, resumed.output
    assert commands_in(resumed.stdout) == [f"{QUICK[1]} --force"]
    assert "\nThe first 2 commands had finished before.\n" in resumed.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tfrecord")} == before


def test_training_is_resumed_and_not_forced(runner, folder, monkeypatch):
    command = "ensemble-kit train demo/gru --train data/train"
    monkeypatch.setattr(demo, "COMMANDS", (QUICK[0], command))
    with monkeypatch.context() as patched:
        patched.setattr("ensemble_kit.pipeline.train", stop)
        runner.invoke(main, ["demo", str(folder)])
        resumed = runner.invoke(main, ["demo", str(folder)])

    assert commands_in(resumed.stdout) == [command]


def test_a_demo_that_is_finished_is_replaced_with_force_only(runner, folder):
    runner.invoke(main, ["demo", str(folder)])

    again = runner.invoke(main, ["demo", str(folder)])
    forced = runner.invoke(main, ["demo", str(folder), "--force"])

    assert again.exit_code == 1
    assert again.stderr == (
        f"Error: {folder} is not empty.\nName another folder, or replace files with --force.\n"
    )
    assert commands_in(forced.stdout)[0] == f"{QUICK[0]} --force"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"finished": "1"}', b"\xff", b"9" * 5000]
)
def test_a_folder_with_another_file_of_that_name_is_not_empty(content, runner, folder):
    folder.mkdir()
    (folder / ".demo.json").write_bytes(content)

    result = runner.invoke(main, ["demo", str(folder)])

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {folder} is not empty.\n")


def test_a_disk_that_cannot_be_written_is_an_error(runner, folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)

    result = runner.invoke(main, ["demo", str(folder)])

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {folder} cannot be made: Read-only file system.\nName a folder you may write to.\n"
    )


def test_a_folder_that_cannot_be_written_is_an_error(runner, folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    folder.mkdir()
    monkeypatch.setattr("ensemble_kit.files.tempfile.mkstemp", refuse)

    result = runner.invoke(main, ["demo", str(folder)])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: .demo.json cannot be written: Read-only file system.\n"
        "Name a folder you may write to.\n"
    )


def test_what_it_says_to_try_next_are_commands_that_there_are():
    text = demo.NEXT.replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("ensemble-kit")]

    assert [words[1] for words in lines] == ["select", "train", "data"]
    for _, name, *words in lines[:2]:
        command = main.get_command(click.Context(main), name)
        command.make_context(name, words)  # raises where an option or a value is none
