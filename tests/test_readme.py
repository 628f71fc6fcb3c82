"""The README says what there is."""

import re
from pathlib import Path

from ensemble_kit.cli.main import COMMANDS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
CI = (Path(__file__).resolve().parents[1] / ".ci" / "run").read_text(encoding="utf-8")
SET_UP = [
    "pip install -c constraints.txt -e . && ensemble-kit demo",
    "pip install -c constraints.txt -e '.[test]' && pytest -n auto",
]


def test_the_table_of_commands_is_that_of_the_command_line():
    shown = re.findall(r"^\| `ensemble-kit ([a-z-]+)` \|", README, flags=re.MULTILINE)

    assert shown == list(COMMANDS)


def test_two_commands_do_all_the_set_up_and_ci_runs_the_second():
    lines = README.splitlines()

    assert [line for line in lines if line.startswith("pip install")] == SET_UP
    assert SET_UP[1] in CI.splitlines()
