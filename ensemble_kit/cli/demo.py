"""ensemble-kit demo."""

import os
import shlex
import time
from pathlib import Path

import click

from ensemble_kit.cli.options import FOLDER, force_option
from ensemble_kit.errors import OutputError

# What a reader would type, in a folder of their own.
ROAD = (
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


@click.command()
@click.argument("folder", type=FOLDER, default=Path("demo"))
@force_option
@click.pass_context
def demo(ctx: click.Context, folder: Path, force: bool) -> None:
    """Run the whole road on synthetic records in FOLDER, a few minutes of work on two cores.

    It makes records in the challenge's format, trains four small sub-models, averages and selects
    them, fuses the selection, exports it, and scores every step on test records. Each command is
    printed before it runs, so that it can be repeated.

    \b
    Example:
        ensemble-kit demo
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    if folder.exists() and any(folder.iterdir()) and not force:
        raise OutputError(
            f"{folder} is not empty.", hint="Name another folder, or replace files with --force."
        )
    root = ctx.find_root().command
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    came_from = Path.cwd()
    click.echo(f"$ mkdir -p {folder} && cd {folder}")
    os.chdir(folder)
    try:
        for line in ROAD:
            words = shlex.split(line)
            if force:
                words.append("--force")
            click.echo(f"\n$ {shlex.join(words) if force else line}")
            with root.make_context("ensemble-kit", words[1:]) as step:
                root.invoke(step)
    finally:
        os.chdir(came_from)
    click.echo(f"\nDone in {time.monotonic() - start:.0f} s. All files are in {folder}.")
