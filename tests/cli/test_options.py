from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from ensemble_kit.cli.options import echo_json, words_of
from ensemble_kit.files import parse_size


@click.command()
@click.argument("recipes", nargs=-1)
@click.option("--train", "training", multiple=True)
@click.option("-o", "--output", default="runs")
@click.option("--seed", type=int, default=0)
@click.option("--no-crc", "check_crc", is_flag=True, flag_value=False, default=True)
@click.option("--compile/--no-compile", default=None)
@click.option("--force", is_flag=True)
@click.option("--jobs", type=int)
@click.option("--quiet", is_flag=True, expose_value=False)
def command(**_):
    pass


def context_of(words):
    return command.make_context("command", list(words))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-o", "else where", "--seed", "0"],
        ["--train", "a*", "--train", "-b", "--seed=7"],
        ["--no-crc", "--no-compile"],
        ["--compile", "--force"],
    ],
)
def test_another_process_is_given_the_same_options(words):
    given = context_of(words)

    passed_on = context_of(words_of(given))

    assert passed_on.params == given.params


def test_defaults_arguments_and_what_is_left_out_are_not_passed_on():
    context = context_of(["a", "b", "--jobs", "2", "--force"])

    assert words_of(context, leave_out={"jobs"}) == ["--force"]


def test_an_option_that_the_command_itself_is_not_given_is_passed_on():
    assert words_of(context_of(["--quiet"])) == ["--quiet"]


class Pair(NamedTuple):
    left: float | None
    right: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    path: Path
    limit: int
    pair: Pair


def test_a_result_with_paths_sizes_and_parts_is_one_json_object(capsys):
    echo_json(Result(Path("a/b"), parse_size("2KB"), Pair(None, ("x", "ü"))))

    assert capsys.readouterr().out == (
        '{"path": "a/b", "limit": 2000, "pair": {"left": null, "right": ["x", "ü"]}}\n'
    )
