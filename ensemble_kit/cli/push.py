"""ensemble-kit push."""

from pathlib import Path

import click

from ensemble_kit.cli.options import EXISTING_FILE, echo_json, force_option, json_option
from ensemble_kit.store.workspace import ONNX


@click.command()
@click.argument("to", metavar="hf:USER/NAME")
@click.argument("file", type=EXISTING_FILE, default=ONNX)
@click.option(
    "--license",
    "license_name",
    metavar="NAME",
    help="Licence, as the Hub names it: apache-2.0, cc-by-4.0  [default: the card's].",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="NAME",
    help="Data set that it was trained on; may be repeated  [default: the card's].",
)
@click.option("--private", is_flag=True, help="Make a repository that only you can read.")
@force_option
@json_option
def push(
    to: str,
    file: Path,
    license_name: str | None,
    datasets: tuple[str, ...],
    private: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Put an exported FILE on the Hugging Face Hub, with its weights and its model card.

    FILE is ensemble/ensemble.onnx unless named. The same command continues a push that was stopped.
    Log in with `hf auth login`, or set HF_TOKEN.

    \b
    Example:
        ensemble-kit push hf:user/video-tags --license cc-by-4.0
        ensemble-kit verify hf:user/video-tags
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.serving.pushing import push as push_file

    pushed = push_file(
        to, file, license=license_name, datasets=datasets, private=private, force=force
    )
    if as_json:
        echo_json(pushed)
        return
    click.echo(f'{file}: OnnxEnsemble("{pushed}") opens it anywhere, pinned to this commit.')
