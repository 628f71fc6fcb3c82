"""ensemble-kit import-onnx."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.choices import ACTIVATION, FRAME_FORM, Activation, FrameForm
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    FILE,
    echo_json,
    force_option,
    json_option,
    one_of,
    records_options,
)
from ensemble_kit.store.workspace import RUNS, RunFolder, check_run_name, run_name
from ensemble_kit.wording import counted


@click.command("import-onnx")
@click.argument("model", type=EXISTING_FILE)
@click.argument("data", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=FILE,
    help=f"File to write  [default: {RunFolder(RUNS / 'NAME').foreign}].",
)
@click.option("--name", help="Its name in selections  [default: the file's name].")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="MODALITY=INPUT",
    help="Input for the frames of a modality, (videos, frames, features), or of several side by "
    "side: rgb+audio=INPUT. INPUT:channels-first takes (videos, features, frames).",
)
@click.option("--num-frames", metavar="INPUT", help="Input for the number of frames.")
@click.option(
    "--is-frame", metavar="INPUT", help="Input for a mask: true for frames, false for padding."
)
@click.option("--probabilities", metavar="OUTPUT", help="Output with a number for each class.")
@click.option(
    "--frames",
    type=one_of(FrameForm),
    default=FRAME_FORM,
    show_default=True,
    help="Form of the frames: bytes as stored, dequantised, or dequantised and L2-normalised.",
)
@click.option(
    "--activation",
    type=one_of(Activation),
    default=ACTIVATION,
    show_default=True,
    help="Function that turns the output into probabilities.",
)
@records_options
@force_option
@json_option
def import_onnx(
    model: Path,
    data: tuple[str, ...],
    output: Path | None,
    name: str | None,
    inputs: tuple[str, ...],
    num_frames: str | None,
    is_frame: str | None,
    probabilities: str | None,
    frames: Any,
    activation: Any,
    force: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Import the ONNX file MODEL of another framework, to predict, select and fuse it.

    DATA are records that it will tag; it is tested on videos of their lengths. Inputs that are
    named after a modality need no option. The new file is compared with MODEL before it is kept.

    \b
    Example:
        ensemble-kit import-onnx tagger.onnx 'validate/*.tfrecord' --input rgb=frames \\
            --num-frames lengths --activation sigmoid
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.foreign.stage import import_onnx as import_model

    mapped = _mapped(inputs)
    name = name or run_name(model.stem)
    check_run_name(name)
    records = Records(data, needs_labels=False, **reading)
    file = import_model(
        model,
        output or RunFolder(RUNS / name).foreign,
        schema=records.schema,
        records=records,
        name=name,
        inputs=mapped,
        num_frames=num_frames,
        is_frame=is_frame,
        probabilities=probabilities,
        frames=frames,
        activation=activation,
        force=force,
    )
    if as_json:
        echo_json(file)
        return
    click.echo(
        f"{file.path}: {counted(file.num_values, 'number')}.\n"
        f"Its probabilities differ from those of {model} by at most {file.worst_difference:.2g}."
    )


def _mapped(texts: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the inputs that each modality is given, from options of the form MODALITY=INPUT."""
    mapped: dict[str, list[str]] = {}
    for text in texts:
        modality, _, value = text.partition("=")
        if not modality or not value:
            raise click.UsageError("--input takes a modality and an input: --input rgb=frames.")
        mapped.setdefault(modality, []).append(value)
    return mapped
