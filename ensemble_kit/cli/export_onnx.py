"""ensemble-kit export-onnx."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.choices import DRAW_SOURCE, REPEATS, DrawSource, InputType
from ensemble_kit.cli.options import (
    FILE,
    FOLDER,
    echo_json,
    force_option,
    json_option,
    max_size_option,
    one_of,
)
from ensemble_kit.store.workspace import FUSED, ONNX


@click.command("export-onnx")
@click.argument("fused", type=FILE, default=FUSED)
@click.option("-o", "--output", type=FILE, default=ONNX, show_default=True, help="File to write.")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=REPEATS,
    show_default=True,
    help="Random frame samples whose probabilities are averaged.",
)
@click.option(
    "--sampling",
    type=one_of(DrawSource),
    default=DRAW_SOURCE,
    show_default=True,
    help="Draw by a table in the file, afresh in each run, or by numbers that are inputs.",
)
@click.option(
    "--input",
    "input_type",
    type=one_of(InputType),
    help="The type of the frames  [default: as the records store them].",
)
@click.option(
    "--low-memory", is_flag=True, help="Write weights into a second file, to be mapped as it is."
)
@click.option("--triton", type=FOLDER, help="Lay out a model repository of NVIDIA Triton here.")
@max_size_option
@force_option
@json_option
def export_onnx(fused: Path, output: Path, max_size: str, as_json: bool, **options: Any) -> None:
    """Export the file FUSED as one ONNX model, with a model card beside it.

    FUSED is ensemble/fused.safetensors unless named. The model is run by ONNX Runtime and compared
    with PyTorch before it is kept. The card, README.md, replaces nothing that a person wrote.

    With --sampling input the number of repeats may be changed in each run, unless a pooling takes
    them one by one, as gated BoF does. With random, a session that is open cannot be seeded.

    \b
    Examples:
        ensemble-kit export-onnx --repeats 10
        ensemble-kit export-onnx --sampling input --input float32 -o serving/ensemble.onnx
        ensemble-kit export-onnx --low-memory --triton models
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.export.stage import export_onnx as export
    from ensemble_kit.files import format_of_limit, parse_size

    exported = export(fused, output, max_size=parse_size(max_size), **options)
    if as_json:
        echo_json(exported)
        return
    card = exported.card or f"{exported.path.with_name('README.md')} was there and is left as it is"
    click.echo(
        f"{exported.path}: {format_of_limit(exported.num_bytes, exported.max_size)}, "
        f"{exported.repeats} repeats.\n"
        f"ONNX Runtime agrees with PyTorch to {exported.worst_difference:.2g}.\n"
        f"Model card: {card}."
    )
