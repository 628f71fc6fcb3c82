"""ensemble-kit export-onnx."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import (
    BLOCK_DTYPES,
    BLOCK_OPSET,
    DRAW_SOURCE,
    OPSET,
    REPEATS,
    TRITON_DELAY,
    TRITON_INSTANCES,
    DrawSource,
    InputType,
)
from ensemble_kit.cli.options import (
    FILE,
    FOLDER,
    echo_json,
    echo_skipped,
    force_option,
    json_option,
    max_gap_loss_option,
    max_size_option,
    one_of,
    records_options,
)
from ensemble_kit.store.workspace import FUSED, ONNX
from ensemble_kit.wording import counted

if TYPE_CHECKING:
    from ensemble_kit.store.provenance import ProofMetadata


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
    "--draw-source",
    type=one_of(DrawSource),
    default=DRAW_SOURCE,
    show_default=True,
    help="Source of random numbers: a table in the file, new ones in each run, or inputs.",
)
@click.option(
    "--input",
    "input_type",
    type=one_of(InputType),
    help="The type of the frames  [default: as the records store them].",
)
@click.option(
    "--opset",
    type=click.IntRange(OPSET, BLOCK_OPSET),
    help="ONNX's operator set, for older runtimes  "
    f"[default: {OPSET}; {BLOCK_OPSET} for {' and '.join(BLOCK_DTYPES)}].",
)
@click.option(
    "--low-memory", is_flag=True, help="Write weights into a second file, which is memory-mapped."
)
@click.option("--triton", type=FOLDER, help="Lay out a model repository of NVIDIA Triton here.")
@click.option(
    "--triton-instances",
    type=click.IntRange(min=1),
    default=TRITON_INSTANCES,
    show_default=True,
    help="Copies of the model that Triton runs at a time, on each GPU where there is one.",
)
@click.option(
    "--triton-delay",
    type=click.IntRange(min=0),
    default=TRITON_DELAY,
    show_default=True,
    help="Microseconds that a request waits in Triton for others to join its batch.",
)
@click.option(
    "--triton-warm-up", is_flag=True, help="Have Triton run one video when it loads the model."
)
@click.option(
    "--data",
    multiple=True,
    help=f"Validation records to measure GAP on, of {' and '.join(BLOCK_DTYPES)}.",
)
@click.option(
    "--measure",
    "measures",
    is_flag=True,
    help="Time opening and running the file in a new process, for the model card.",
)
@max_gap_loss_option("Maximum GAP that computing from packed numbers may lose on --data.")
@max_size_option
@records_options
@force_option
@json_option
def export_onnx(
    fused: Path,
    output: Path,
    repeats: int,
    draw_source: Any,
    input_type: Any,
    opset: Any,
    low_memory: bool,
    triton: Path | None,
    triton_instances: int,
    triton_delay: int,
    triton_warm_up: bool,
    data: tuple[str, ...],
    measures: bool,
    max_gap_loss: float,
    max_size: str,
    force: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Export the file FUSED as one ONNX model, with a model card beside it.

    FUSED is ensemble/fused.safetensors unless named. The model is run by ONNX Runtime and compared
    with PyTorch before it is kept. The card, README.md, replaces nothing that a person wrote.
    Products of a file in int8 or int4 are computed from its packed numbers; --data measures what
    that does to GAP. With --opset 20 they take the same number of bytes, but are converted to
    float32 once, when the file is opened.

    With --draw-source input, each run may have another number of repeats, unless a pooling takes
    them one by one, as gated BoF does. With random, an open session cannot be seeded.

    \b
    Examples:
        ensemble-kit export-onnx --repeats 10
        ensemble-kit export-onnx --data 'validate/*.tfrecord'
        ensemble-kit export-onnx --draw-source input --input float32 -o serving/ensemble.onnx
        ensemble-kit export-onnx --low-memory --triton models
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.export.stage import export_onnx as export
    from ensemble_kit.files import format_of_limit, parse_size
    from ensemble_kit.serving.triton import TritonConfig

    config = TritonConfig(triton_instances, triton_delay, triton_warm_up)
    if triton is None and config != TritonConfig():
        raise click.UsageError("--triton-... belong to a model repository; name one with --triton.")
    records = Records(data, **reading) if data else None
    exported = export(
        fused,
        output,
        repeats=repeats,
        draw_source=draw_source,
        input_type=input_type,
        opset=opset,
        low_memory=low_memory,
        triton=triton,
        triton_config=config,
        max_size=parse_size(max_size),
        records=records,
        max_gap_loss=max_gap_loss,
        measures=measures,
        force=force,
    )
    if as_json:
        echo_json(exported)
        return
    card = exported.card or f"{exported.path.with_name('README.md')} was there and is left as it is"
    click.echo(
        f"{exported.path}: {format_of_limit(exported.num_bytes, exported.max_size)}, "
        f"{counted(exported.repeats, 'repeat')}."
    )
    _echo_proof(exported.proof)
    click.echo(f"Model card: {card}.")
    if records is not None:
        echo_skipped(records)


def _echo_proof(proof: "ProofMetadata") -> None:
    shipped = ""
    if proof.shipped_difference is not None:
        shipped = f" with exact sums, and to {proof.shipped_difference:.2g} as it is run"
    click.echo(
        f"ONNX Runtime agrees with PyTorch to {proof.exact_difference:.2g}{shipped}.\n"
        f"Numbers are used: {proof.shares}."
    )
    if proof.gap is not None:
        click.echo(
            f"GAP on {counted(proof.gap.videos, 'video')}: {proof.gap.exact:.4f} with the same "
            f"weights in float32, {proof.gap.shipped:.4f} as it is run."
        )
