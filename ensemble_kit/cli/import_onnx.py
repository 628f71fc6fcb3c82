"""ensemble-kit import-onnx."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.choices import ACTIVATION, FRAME_FORM, Activation, FrameForm
from ensemble_kit.cli.options import EXISTING_FILE, FILE, force_option, one_of, records_options


@click.command("import-onnx")
@click.argument("model", type=EXISTING_FILE)
@click.argument("data", nargs=-1, required=True)
@click.option(
    "-o", "--output", type=FILE, help="File to write  [default: runs/NAME/foreign.safetensors]."
)
@click.option("--name", help="What selections will call it  [default: the file's name].")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="MODALITY=INPUT",
    help="The input for a modality's frames, or for several side by side: rgb+audio=INPUT.",
)
@click.option("--num-frames", metavar="INPUT", help="The input for the number of frames.")
@click.option("--is-frame", metavar="INPUT", help="The input that tells frames from padding.")
@click.option("--probabilities", metavar="OUTPUT", help="The output with a number for each class.")
@click.option(
    "--frames",
    type=one_of(FrameForm),
    default=FRAME_FORM,
    show_default=True,
    help="How the model reads frames: bytes, numbers, or numbers with joint frames of length 1.",
)
@click.option(
    "--activation",
    type=one_of(Activation),
    default=ACTIVATION,
    show_default=True,
    help="What makes probabilities of the output.",
)
@records_options
@force_option
def import_onnx(
    model: Path,
    data: tuple[str, ...],
    output: Path | None,
    name: str | None,
    inputs: tuple[str, ...],
    force: bool,
    **options: Any,
) -> None:
    """Import the ONNX file MODEL, made by another framework, to predict, select and fuse it.

    DATA are records that it tags; only what they hold is looked at. Inputs that are called like a
    modality need no option. The imported file is compared with MODEL before it is kept.

    \b
    Example:
        ensemble-kit import-onnx tagger.onnx 'validate/*.tfrecord' --input rgb=frames \\
            --num-frames lengths --activation sigmoid
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.foreign.stage import import_onnx as import_model
    from ensemble_kit.store.workspace import RUNS, check_run_name, run_name

    reading = {
        key: options.pop(key)
        for key in (
            "schema",
            "label_names",
            "check_crc",
            "skip_bad_records",
            "cache",
            "cache_bytes",
        )
    }
    pairs = dict(each.rpartition("=")[::2] for each in inputs)
    if "" in pairs or "" in pairs.values():
        raise click.UsageError("--input takes a modality and an input: --input rgb=frames.")
    name = name or run_name(model.stem)
    check_run_name(name)
    imported = import_model(
        model,
        output or RUNS / name / "foreign.safetensors",
        schema=Records(data, needs_labels=False, **reading).schema,
        name=name,
        inputs=pairs,
        force=force,
        **options,
    )
    click.echo(
        f"{imported.path}: {imported.num_values:,} numbers.\n"
        f"Equal to {model} to {imported.worst_difference:.2g}."
    )
