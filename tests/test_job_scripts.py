"""The job scripts of the docs, word for word, where the cluster's own commands are stand-ins."""

import re
import subprocess
from pathlib import Path

import click
import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "more-than-one-machine.md"
ENDS = {0: "finished", 1: "failed", 130: "stopped"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def script(word):
    (found,) = [each for each in blocks("sh") if f"--job-name={word}" in each]
    return found


@pytest.fixture
def run(tmp_path):
    """Run a script; return its exit code, and the words that each command was given."""
    log = tmp_path / "log"
    stand_ins = {
        "srun": 'exec "$@"',
        "scontrol": f'echo "scontrol $*" >> {log}',
        "ensemble-kit": f'for w; do echo "word $w" >> {log}; done; exit $CODE',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(text, *, code=0, **variables):
        log.write_text("")
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code)} | variables
        result = subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, env=environment, timeout=20, check=False
        )
        lines = log.read_text().splitlines()
        words = [line.removeprefix("word ") for line in lines if line.startswith("word ")]
        return result.returncode, words, [line for line in lines if line.startswith("scontrol ")]

    return run


def parsed(words, monkeypatch):
    """Return the options that the command of the kit would take, or fail as it would."""
    from ensemble_kit.cli.main import main

    monkeypatch.setattr("os.path.isfile", lambda _: True)  # the model
    group = click.Context(main)
    command = main.get_command(group, words[0])
    return command.make_context(words[0], words[1:], parent=group).params


@pytest.mark.parametrize("code", ENDS)
def test_a_training_task_is_requeued_if_it_was_stopped(run, monkeypatch, code):
    ended, words, others = run(
        script("train"), code=code, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2"
    )

    options = parsed(words, monkeypatch)
    assert (options["index"], options["recipes"][1]) == (2, "willow/gru")
    assert options["training"] == ("train/*.tfrecord",)
    assert ended == code
    assert others == (["scontrol requeue 7_2"] if ENDS[code] == "stopped" else [])


def test_a_predicting_task_has_its_share(run, monkeypatch):
    ended, words, _ = run(script("predict"), SLURM_ARRAY_TASK_ID="32", SLURM_ARRAY_TASK_COUNT="32")

    options = parsed(words, monkeypatch)
    assert (ended, options["share"], options["output"]) == (0, "32/32", "predictions/")


def test_a_pod_has_its_share_counted_from_1(run, monkeypatch):
    (job,) = blocks("yaml")
    folded = job.partition("args:\n            - ")[2].partition("volumeMounts:")[0]
    ended, words, _ = run(" ".join(folded.split()), JOB_COMPLETION_INDEX="7")

    assert (ended, parsed(words, monkeypatch)["share"]) == (0, "8/8")
    assert "parallelism: 8\n" in job
    assert "completions: 8\n" in job


def test_every_exit_code_of_the_kit_is_in_the_table():
    from ensemble_kit.interrupts import INTERRUPTED

    codes = re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert codes == ["0", "1", "2", str(INTERRUPTED), "137"]
