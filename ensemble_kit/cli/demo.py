"""ensemble-kit demo."""

import json
import shlex
import time
from contextlib import chdir
from os.path import exists
from pathlib import Path

import click

from ensemble_kit.cli.options import FOLDER, force_option
from ensemble_kit.errors import OutputError
from ensemble_kit.files import written_aside
from ensemble_kit.wording import counted

# What a reader would type in an empty folder.
COMMANDS = (
    "ensemble-kit data synthesize data",
    "ensemble-kit train demo/average-moe demo/soft-bof demo/netvlad demo/gru"
    " --train 'data/train/*.tfrecord' --validation 'data/validate/*.tfrecord'",
    "ensemble-kit select",
    "ensemble-kit fuse --dtype fp32 -o ensemble/fused-fp32.safetensors",
    "ensemble-kit fuse --dtype bf16",
    "ensemble-kit export-onnx",
    "ensemble-kit export-onnx --repeats 1 -o ensemble/once.onnx",
    "ensemble-kit report 'data/test/*.tfrecord'",
)
# What to try after that in the demo's folder, where each of these works as it stands.
NEXT = """
What to try next, in that folder:

# look at what was chosen, and why: open ensemble/report.html in a browser
# choose under a limit that leaves a member out
ensemble-kit select --max-size 600KB -o ensemble/small.json --report --force
# train one of the networks for longer, and choose again
ensemble-kit train demo/netvlad --name longer --set training.max_steps=640 \\
    --train 'data/train/*.tfrecord' --validation 'data/validate/*.tfrecord'
# make records of your own features
ensemble-kit data convert --help"""
STATE = Path(".demo.json")  # how many of the commands have finished


@click.command()
@click.argument("folder", type=FOLDER, default=Path("demo"))
@force_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each result.")
@click.pass_context
def demo(ctx: click.Context, folder: Path, force: bool, as_json: bool) -> None:
    """Run the whole pipeline on synthetic records in FOLDER; it takes minutes on two cores.

    It makes records in the challenge's format, trains four small sub-models and averages their
    checkpoints, selects members, fuses them, exports the ensemble, and scores every step on test
    records. Each command is printed before it runs, so that you can repeat it. If the demo is
    stopped, the same command resumes it.

    \b
    Example:
        ensemble-kit demo
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    root = ctx.find_root().command
    resumed = None if force else _num_finished(folder)
    start = time.monotonic()
    _make(folder)
    click.echo(f"$ mkdir -p {folder} && cd {folder}", err=as_json)
    if resumed:
        finished = f"\nThe first {counted(resumed, 'command')} had finished before."
        click.echo(finished, err=as_json)
    with chdir(folder):
        for number, line in enumerate(COMMANDS[resumed or 0 :], start=resumed or 0):
            _write_state(number)
            words = shlex.split(line)
            # a command that was stopped may have written files; `train` resumes its runs instead
            if force or (number == resumed and words[1] != "train"):
                words.append("--force")
            if as_json:
                words.append("--json")
            is_changed = len(words) > len(shlex.split(line))
            click.echo(f"\n$ {shlex.join(words) if is_changed else line}", err=as_json)
            with root.make_context("ensemble-kit", words[1:]) as step:
                root.invoke(step)
        _write_state(len(COMMANDS))
    seconds = time.monotonic() - start
    click.echo(f"\nDone in {seconds:.0f} s. All files are in {folder}.", err=as_json)
    click.echo(NEXT, err=as_json)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror}.", hint="Name a folder you may write to."
        ) from error


def _num_finished(folder: Path) -> int | None:
    """Return how many commands of a stopped demo have finished; None if the folder is empty.

    Raises:
        OutputError: The folder holds a demo that is finished, or something else.
    """
    try:
        finished = json.loads((folder / STATE).read_text(encoding="utf-8"))["finished"]
    except (OSError, ValueError, KeyError, TypeError):
        finished = None
    if isinstance(finished, int) and 0 <= finished < len(COMMANDS):
        return finished
    if exists(folder) and any(folder.iterdir()):
        raise OutputError(
            f"{folder} is not empty.", hint="Name another folder, or replace files with --force."
        )
    return None


def _write_state(finished: int) -> None:
    with written_aside(STATE, force=True) as aside:
        aside.write_text(json.dumps({"finished": finished}), encoding="utf-8")
