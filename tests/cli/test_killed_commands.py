"""Commands that are ended at random moments leave nothing that their next run does not repair."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS / "cli" / "killed_commands.py"


@pytest.mark.exhaustive
def test_a_command_that_was_ended_and_run_again_leaves_what_an_undisturbed_one_does(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "kills", "0", "3"]
    paths = os.pathsep.join([str(TESTS), str(TESTS / "data"), os.environ.get("PYTHONPATH", "")])

    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )

    lines = [line for line in result.stdout.splitlines() if "ended before" in line]
    assert len(lines) == SCRIPT.read_text().count(": Case(")
    assert all(" 0 problems," in line for line in lines), result.stdout
