"""The README, and the pages that it leads to, say what there is."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

import ensemble_kit
from ensemble_kit.cli import main
from ensemble_kit.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "benchmarks/README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md"))),
]
NO_COMMANDS = {"benchmarks/README.md", "docs/paper_tables.md", "docs/results.md"}
SET_UP = [
    "pip install -c constraints.txt -e . && ensemble-kit demo",
    "pip install -c constraints.txt -e '.[test]' && pytest -n auto",
]
VALUES = (click.Choice, click.IntRange, click.FloatRange)  # files need not be here
PUBLIC = {
    "ensemble_kit",
    "ensemble_kit.runtime",
    "ensemble_kit.metrics",
    "ensemble_kit.data.dataset",
    "ensemble_kit.data.schema",
    "ensemble_kit.data.synthetic",
}


def blocks_of(page, language):
    """Return the code blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(page):
    """Return the words that follow ``ensemble-kit`` in each shell command of a page."""
    lines = "".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [
        line[line.index(name) + 1 :]
        for line in words
        for name in ("ensemble-kit", "ensemble_kit")
        if name in line and "pip" not in line
    ]


def check_command(words):
    """Raise ``click.UsageError`` unless a command and its options exist and take such values."""
    command, context = main, click.Context(main)
    while isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(context, name)
        if command is None:
            raise click.UsageError(f"there is no command {name}")
        context = click.Context(command, info_name=name, parent=context)
    values, extra, _ = command.make_parser(context).parse_args(list(words))
    if extra:
        raise click.UsageError(f"{command.name} takes no {extra}")
    for parameter in command.params:
        given = values.get(parameter.name)
        if isinstance(given, str) and isinstance(parameter.type, VALUES):
            parameter.type.convert(given, parameter, context)


def names_of(code):
    """Yield the module and name of everything of the kit that some Python imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if "ensemble_kit" in alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("ensemble_kit"):
            yield from ((node.module, alias.name) for alias in node.names)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_table_of_commands_is_that_of_the_command_line():
    shown = re.findall(r"^\| `ensemble-kit ([a-z-]+)` \|", README, flags=re.MULTILINE)

    assert shown == list(COMMANDS)


def test_two_commands_do_all_the_set_up_and_ci_runs_the_second():
    lines = README.splitlines()

    assert [line for line in lines if line.startswith("pip install")] == SET_UP
    assert SET_UP[1] in CI.splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_exists(page):
    commands = commands_of(page)
    assert bool(commands) == (page not in NO_COMMANDS)
    for words in commands:
        check_command(words)


def test_the_pipeline_is_six_commands():
    (pipeline,) = (block for block in blocks_of("README.md", "bash") if "kit select" in block)

    assert re.findall(r"^ensemble-kit ([a-z-]+)", pipeline, flags=re.MULTILINE) == [
        "data", "train", "select", "fuse", "export-onnx", "report",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("mix", "there is no command mix"),
        ("recipes lst", "there is no command lst"),
        ("fuse --type bf16", "No such option '--type'."),
        ("fuse --dtype bf15", "'bf15' is not one of 'fp32', 'fp16', 'bf16', 'int8'."),
        ("export-onnx --repeats ten", "'ten' is not a valid integer range."),
        ("export-onnx a b", r"export-onnx takes no \['b'\]"),
    ],
)
def test_a_command_that_does_not_exist_would_be_found(words, problem):
    with pytest.raises(click.UsageError, match=problem):
        check_command(words.split())


@pytest.mark.parametrize("page", PAGES)
def test_every_page_that_a_page_links_to_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")

    for link in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).is_file(), link


def test_the_readme_links_to_every_page():
    linked = set(re.findall(r"\]\(([^)#]+)\)", README))

    assert len(PAGES) >= 9
    assert {"CHANGELOG.md", "CONTRIBUTING.md", *PAGES[1:]} <= linked


@pytest.mark.parametrize("page", PAGES)
def test_python_that_a_page_shows_imports_public_names_only(page):
    for module, name in (names for code in blocks_of(page, "python") for names in names_of(code)):
        assert module in PUBLIC
        assert name is None or hasattr(importlib.import_module(module), name)
        assert module != "ensemble_kit" or name in ensemble_kit.__all__


def test_the_readmes_python_runs_and_its_file_is_served(tmp_path, monkeypatch):
    serve, pipeline = blocks_of("README.md", "python")
    monkeypatch.chdir(tmp_path)

    exec(compile(pipeline, "README.md, from Python", "exec"), {})
    names = {}
    narrow = serve.replace("1024", "64").replace("128", "16")  # widths of the synthetic records
    assert narrow.count("64") == narrow.count("16") == 1
    exec(compile(narrow, "README.md, serving", "exec"), names)

    assert names["tags"].labels.shape == names["tags"].confidences.shape == (1, 20)


def test_own_features_become_records_and_a_run_as_the_page_shows(tmp_path, monkeypatch, runner):
    (code,) = blocks_of("docs/records.md", "python")
    commands = blocks_of("docs/records.md", "bash")[0].replace("\\\n", " ").splitlines()
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "docs/records.md", "exec"), {})
    for command in commands:
        result = runner.invoke(main, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output

    assert (tmp_path / "runs" / "demo-average-moe" / "validation.safetensors").is_file()
