"""What all commands share: help, and errors that are text and an exit code."""

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path

import click
import pytest

import ensemble_kit
from ensemble_kit.cli import main
from ensemble_kit.cli.main import COMMANDS
from ensemble_kit.errors import RecipeError
from ensemble_kit.progress import progress
from ensemble_kit.recipes.reading import recipe_names

RECORDS = ["--train", "no.tfrecord"]
MISSING = {
    "data convert": (
        ["no", "--labels", "no.csv", "-o", "out"],
        "no.csv does not exist.\nName a file",
    ),
    "data info": (["no.tfrecord"], "{cwd}/no.tfrecord does not exist.\nName TFRecord files"),
    "data check": (["no/*"], "{cwd}/no/* matches no file.\nName TFRecord files"),
    "train": (["demo/gru", *RECORDS], "{cwd}/no.tfrecord does not exist.\nName TFRecord files"),
    "average": (["runs/no"], "runs/no does not exist.\nName a file or folder"),
    "import-onnx": (["no.onnx", "no.tfrecord"], "no.onnx does not exist.\nName a file"),
    "predict": (["no.onnx", "no.tfrecord", "-o", "p.csv"], "no.onnx does not exist.\nName a file"),
    "evaluate": (["no.safetensors"], "no.safetensors does not exist.\nName a file or folder"),
    "select": (["no.csv"], "no.csv does not exist.\nName a file or folder"),
    "verify": (["no.onnx"], "no.onnx does not exist.\nName a file"),
    "calibrate": (["no.onnx", "p.npz", "-o", "c.onnx"], "no.onnx does not exist.\nName a file"),
    "report": (["no.tfrecord"], "{cwd}/no.tfrecord does not exist.\nName TFRecord files"),
    "recipes check": (["no.toml"], "no.toml does not exist.\nName a file"),
}
UNNAMED = {
    "select": (
        [],
        "There are no predictions: runs/*/validation.safetensors matches nothing in {cwd}.\n"
        "Name predictions files, or change to a folder where `ensemble-kit train` ran.",
    ),
    "fuse": (
        [],
        "ensemble/selection.json cannot be read: No such file or directory.\n"
        "Run `ensemble-kit select` first, or name a selection that exists.",
    ),
    "export-onnx": (
        [],
        "ensemble/fused.safetensors does not exist.\nName a file that exists.",
    ),
    "push": (["hf:ada/tags"], "ensemble/ensemble.onnx does not exist.\nName a file that exists."),
    "train": (
        ["no/such", *RECORDS],
        "There is no recipe 'no/such'.\n"
        "List the recipes with `ensemble-kit recipes list`, or name a .toml file.",
    ),
    "runs": (
        ["no"],
        "{cwd}/no holds no runs.\nTrain some with `ensemble-kit train`, or name a folder of runs.",
    ),
    "predictions merge": (
        ["no", "-o", "p.csv"],
        "no is no folder of predictions: it holds no predictions.json.\n"
        "Name a predictions file, or a folder that `ensemble-kit predict` wrote.",
    ),
    "recipes show": (
        ["willow/grue"],
        "There is no recipe 'willow/grue' (did you mean 'willow/gru'?).\n"
        "List the recipes with `ensemble-kit recipes list`, or name a .toml file.",
    ),
    "recipes copy": (
        ["no.toml", "mine.toml"],
        "no.toml does not exist.\n"
        "Name a TOML file that exists, or a recipe of `ensemble-kit recipes list`.",
    ),
    "recipes show --json": (
        ["willow/gru", "--schema", "no.toml"],
        "no.toml cannot be read: No such file or directory.\nName a schema TOML that exists.",
    ),
}


def leaves(command, name=""):
    if isinstance(command, click.Group):
        for each in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), each)
            yield from leaves(child, f"{name} {each}".strip())
    else:
        yield name, command


ALL = dict(leaves(main))


def test_the_table_has_every_module_of_commands():
    folder = Path(ensemble_kit.cli.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")}
    modules -= {"__init__", "main", "options", "side_by_side"}
    modules -= {"convert", "download"}  # of `data`

    assert set(COMMANDS.values()) == modules
    assert len(ALL) >= 16


def test_help_names_the_commands_in_the_order_of_the_pipeline(runner):
    result = runner.invoke(main, ["-h"])

    assert result.exit_code == 0
    listed = result.stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "] == [
        *COMMANDS
    ]
    assert result.stdout == runner.invoke(main, ["--help"]).stdout


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help_with_an_example_of_itself(name, runner):
    result = runner.invoke(main, [*name.split(), "--help"])

    assert result.exit_code == 0
    about, example = result.stdout.split("Example")
    assert len(about.split("\n\n")[1].strip()) > 20
    assert f"ensemble-kit {name} " in f"{example.split('Options:')[0]} ".replace("\n", " ")


def test_the_version_is_the_packages(runner):
    result = runner.invoke(main, ["--version"])

    assert result.stdout == f"ensemble-kit, version {ensemble_kit.__version__}\n"


@pytest.mark.parametrize("name", ["merge", "export_onnx"])
def test_an_unknown_command_is_refused(name, runner):
    result = runner.invoke(main, [name])

    assert result.exit_code == 2
    assert f"No such command '{name}'" in result.stderr


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_option_is_an_error_of_usage(name, runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = runner.invoke(main, [*name.split(), "--no-such-option"])

    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert "--no-such-option" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MISSING)
def test_a_file_that_is_not_there_is_one_error(name, runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, text = MISSING[name]

    result = runner.invoke(main, [*name.split(), *arguments])

    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr
        == f"Error: {text} that exist{'' if 'TFRecord' in text else 's'}.\n".format(cwd=tmp_path)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", UNNAMED)
def test_a_default_that_is_not_there_is_one_error(name, runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, text = UNNAMED[name]

    result = runner.invoke(main, [*name.split(), *arguments])

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {text}\n".format(cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_command_that_reads_a_file_has_a_test_of_its_absence():
    assert ALL.keys() - MISSING.keys() - UNNAMED.keys() == {
        "data download audioset",
        "data download youtube8m",
        "data synthesize",
        "demo",
        "recipes list",
        "recipes new",
        "recipes schema",
    }


def test_a_folder_in_the_place_of_a_file_is_named(runner, tmp_path):
    result = runner.invoke(main, ["verify", str(tmp_path)])

    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path} is not a file.\nName a file that exists.\n"


@pytest.mark.parametrize("command", ["fuse", "export-onnx"])
def test_a_limit_that_is_no_size_is_named(command, runner):
    result = runner.invoke(main, [command, "--max-size", "1 hectare"])

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: '1 hectare' is not a size.\n"
        "Write a number and a unit: 1GiB (2^30 bytes), 1GB (10^9 bytes), 995MiB.\n"
    )


def test_an_interrupt_ends_any_command_with_130_and_no_traceback(runner, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ensemble_kit.networks.catalogue.list_recipes", stop)

    result = runner.invoke(main, ["recipes", "list"])

    assert (result.exit_code, result.output) == (130, "")


def test_an_error_of_the_kit_itself_is_not_hidden(runner, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("ensemble_kit.networks.catalogue.list_recipes", fail)

    with pytest.raises(ZeroDivisionError):
        runner.invoke(main, ["recipes", "list"], catch_exceptions=False)


@pytest.mark.parametrize("words", [["--version"], ["recipes", "list"]])
def test_a_full_standard_output_is_one_error(words):
    command = [sys.executable, "-m", "ensemble_kit", *words]

    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert (result.returncode, result.stderr) == (
        1,
        "Error: Standard output cannot be written: No space left on device.\n"
        "Free some space, or send it elsewhere.\n",
    )


def test_streams_that_were_closed_are_open_before_any_file_is(tmp_path):
    (tmp_path / "code.py").write_text(
        "import os, sys\n"
        "from ensemble_kit import __main__\n"
        "sys.argv = ['ensemble-kit', '--version']\n"
        "try:\n"
        "    __main__.run()\n"
        "finally:\n"
        "    open(sys.path[0] + '/handle', 'w').write(str(os.open(os.devnull, 0)))\n"
    )
    line = f"exec {sys.executable} {tmp_path / 'code.py'} <&- >&- 2>&-"

    assert subprocess.run(["sh", "-c", line], check=False).returncode == 0
    assert int((tmp_path / "handle").read_text()) > 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("unable to mmap 5760 bytes: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."),
    ],
)
def test_no_memory_is_one_error(error, runner, monkeypatch):
    def fail(*_, **__):
        raise ValueError("another library's words") from error

    monkeypatch.setattr("ensemble_kit.networks.catalogue.list_recipes", fail)

    result = runner.invoke(main, ["recipes", "list"])

    assert (result.exit_code, result.output) == (
        1,
        "Error: There is not enough memory.\n"
        "Free some, or raise the limit (`ulimit -v`); smaller batches and fewer processes need "
        "less.\n",
    )


def test_the_demo_writes_into_no_folder_that_holds_something(runner, tmp_path):
    (tmp_path / "mine").touch()

    result = runner.invoke(main, ["demo", str(tmp_path)])

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {tmp_path} is not empty.\nName another folder, or replace files with --force.\n"
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["selct"], "No such command 'selct'. Did you mean 'select'?"),
        (["export"], "No such command 'export'. Did you mean 'export-onnx'?"),
        (["data", "inf"], "No such command 'inf'. Did you mean 'info'?"),
        (["recipes", "shwo"], "No such command 'shwo'. Did you mean 'show'?"),
        (["bake"], "No such command 'bake'."),
    ],
)
def test_a_command_that_was_probably_meant_is_named(words, problem, runner):
    result = runner.invoke(main, words)

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {problem}"


@pytest.mark.parametrize("word", ["--quiet", "--json"])
def test_every_command_can_be_quiet_and_print_json(word, runner):
    commands = dict(leaves(main))
    assert {"train", "select", "data info", "recipes check"} <= commands.keys()
    for name, command in commands.items():
        options = [option for option in command.params if word in option.opts]
        assert len(options) == 1, name


@pytest.mark.parametrize(
    ("name", "word"), [("--.tfrecord", "--.tfrecord"), ("-x.tfrecord", "-x"), ("-x\x1b[2K", "-x")]
)
def test_a_file_that_looks_like_an_option_is_named(name, word, runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()

    result = runner.invoke(main, ["data", "info", name])

    shown = name.replace("\x1b", "\\x1b")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: No such option '{word}', but there is a file {shown}. "
        f"Write ./{shown}, or -- before the files."
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["runs", "a", "b"], "Got unexpected extra argument ('b')."),
        (
            ["fuse", "s.json", "--data", "v0.tfrecord", *["v1.tfrecord"] * 20],
            f"Got unexpected extra arguments ('{('v1.tfrecord ' * 20)[:76]}...). Quote patterns, "
            "so that the shell does not spell them out.",
        ),
    ],
    ids=["few", "many"],
)
def test_words_too_many_are_cut_and_patterns_of_records_are_to_be_quoted(words, problem, runner):
    result = runner.invoke(main, words)

    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {problem}")


def test_records_in_place_of_a_recipe_are_a_pattern_that_was_not_quoted(runner):
    result = runner.invoke(main, ["train", "demo/gru", "--train", "a.tfrecord", "b.tfrecord"])

    assert (result.exit_code, result.stderr) == (
        1,
        "Error: 'b.tfrecord' is a file of records, not a recipe.\n"
        "Quote patterns, so that the shell does not spell them out: --train 'train/*.tfrecord'.\n",
    )


def test_a_quiet_command_shows_no_progress(runner, monkeypatch):
    def work(*_, **__):
        with progress("work", 1) as bar:
            bar.update(1)
        return []

    monkeypatch.setattr("ensemble_kit.store.runs.list_runs", work)

    assert runner.invoke(main, ["runs"]).stderr == "work: 1/1\n"
    assert runner.invoke(main, ["runs", "--quiet"]).stderr == ""
    assert runner.invoke(main, ["runs"]).stderr == "work: 1/1\n"  # the next one is not quiet


@pytest.mark.parametrize("name", ["n" * 300, "n" * 1500])
def test_a_name_that_no_file_can_have_does_not_exist(name, runner):
    result = runner.invoke(main, ["evaluate", name])

    assert result.exit_code == 1
    assert result.stderr == f"Error: {name} does not exist.\nName a file or folder that exists.\n"


def test_a_result_is_printed_as_one_json_object(runner, tmp_path):
    words = ["data", "synthesize", str(tmp_path / "r"), "--train", "3", "--validate", "0"]
    result = runner.invoke(main, [*words, "--test", "0", "--json"])
    assert json.loads(result.stdout) == {
        "path": str(tmp_path / "r"), "videos": {"train": 3, "validate": 0, "test": 0}
    }  # fmt: skip

    output = tmp_path / "gru.toml"
    result = runner.invoke(main, ["recipes", "copy", "willow/gru", str(output), "--json"])
    assert json.loads(result.stdout) == {"path": str(output), "recipe": "willow/gru"}


def test_a_traceback_is_shown_where_it_is_asked_for(runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = runner.invoke(main, ["--traceback", "recipes", "show", "willow/grue"])

    assert isinstance(result.exception, RecipeError)
    assert "there is no recipe" in str(result.exception).lower()


def test_an_option_can_stand_in_the_environment(runner, monkeypatch):
    monkeypatch.setenv("ENSEMBLE_KIT_RECIPES_LIST_PAPER", "mfb")

    result = runner.invoke(main, ["recipes", "list"])

    rows = result.stdout.splitlines()[1:]
    assert rows
    assert all(row.startswith("mfb/") for row in rows)


def test_verbose_says_what_is_opened_and_written(runner, tmp_path):
    words = ["data", "synthesize", str(tmp_path / "r"), "--train", "3", "--validate", "0"]

    quiet = runner.invoke(main, [*words, "--test", "0"])
    result = runner.invoke(main, ["--verbose", "data", "check", str(tmp_path / "r/train/*")])
    again = runner.invoke(main, ["data", "check", str(tmp_path / "r/train/*")])

    assert "of records" not in quiet.stderr
    (line,) = (line for line in result.stderr.splitlines() if "of records" in line)
    assert line.endswith(f"  {tmp_path / 'r/train/*'}: 3 files of records")
    assert "of records" not in again.stderr  # one command's option is not another's
    assert logging.getLogger("ensemble_kit").handlers == []


@pytest.mark.parametrize("command", [["train"], ["recipes", "show"], ["recipes", "copy"]])
def test_a_shell_completes_the_names_of_recipes(runner, command):
    environment = {
        "_ENSEMBLE_KIT_COMPLETE": "bash_complete",
        "COMP_WORDS": f"ensemble-kit {' '.join(command)} willow/gat",
        "COMP_CWORD": str(len(command) + 1),
    }

    result = runner.invoke(main, [], prog_name="ensemble-kit", env=environment)

    found = [line.removeprefix("plain,") for line in result.stdout.splitlines()]
    assert found == [name for name in recipe_names() if name.startswith("willow/gat")]
    assert len(found) > 3
