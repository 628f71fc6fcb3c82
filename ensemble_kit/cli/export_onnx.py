"""ensemble-kit export-onnx."""

from pathlib import Path

import click

from ensemble_kit.cli.options import FILE, force_option, max_size_option
from ensemble_kit.workspace import FUSED, ONNX


@click.command("export-onnx")
@click.argument("fused", type=FILE, default=FUSED)
@click.option("-o", "--output", type=FILE, default=ONNX, show_default=True, help="File to write.")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Random frame samples whose probabilities are averaged.",
)
@max_size_option
@force_option
def export_onnx(fused: Path, output: Path, repeats: int, max_size: str, force: bool) -> None:
    """Export the file FUSED as one ONNX model.

    FUSED is ensemble/fused.safetensors unless named. The model is run by ONNX Runtime and compared
    with PyTorch before it is kept.

    \b
    Example:
        ensemble-kit export-onnx --repeats 10
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.export import export_onnx as export
    from ensemble_kit.files import format_size, parse_size

    exported = export(fused, output, repeats=repeats, max_size=parse_size(max_size), force=force)
    click.echo(
        f"{exported.path}: {format_size(exported.num_bytes)} of {format_size(exported.max_size)}, "
        f"{repeats} repeats.\n"
        f"ONNX Runtime agrees with PyTorch to {exported.worst_difference:.2g}."
    )
