"""ensemble-kit verify."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ensemble_kit.choices import ON_HUB
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    EXISTING_FILE_OR_ON_HUB,
    echo_csv,
    echo_skipped,
    max_gap_loss_option,
    max_size_option,
    records_options,
    table_options,
)
from ensemble_kit.errors import VerificationError


@click.command()
@click.argument("file", type=EXISTING_FILE_OR_ON_HUB)
@click.argument("data", nargs=-1)
@click.option(
    "--fused",
    type=EXISTING_FILE,
    help="The fused file that an ONNX file was exported from  [default: the one beside it].",
)
@max_gap_loss_option("How far the GAP on DATA may be below the claimed GAP.")
@max_size_option
@records_options
@table_options
def verify(
    file: Path,
    data: tuple[str, ...],
    fused: Path | None,
    max_gap_loss: float,
    max_size: str,
    as_json: bool,
    as_csv: bool,
    **reading: Any,
) -> None:
    """Recompute what FILE, a fused or an ONNX file, claims of itself.

    FILE may be on the Hugging Face Hub: hf:user/name, or hf:user/name@revision.

    The claims are the hash of its content, its size, the types of its weights, the hashes of the
    files that it was made from, that it computes what they do, and its GAP on DATA, the validation
    records. Claims about files that are missing are not checked. Exits with 1 if a claim fails.

    \b
    Example:
        ensemble-kit verify ensemble/ensemble.onnx 'validate/*.tfrecord'
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.files import parse_size
    from ensemble_kit.serving.hub import fetch
    from ensemble_kit.verification import verify as verify_file

    name = str(file)
    if name.startswith(ON_HUB):
        file, reference = fetch(name)
        name = str(reference)
    if fused is not None and file.suffix.lower() != ".onnx":
        raise click.UsageError("--fused belongs to an ONNX file.")
    records = Records(data, **reading) if data else None
    claims = verify_file(
        file, records, fused=fused, max_size=parse_size(max_size), max_gap_loss=max_gap_loss
    )
    if records is not None:
        echo_skipped(records)
    failed = [claim.name for claim in claims if claim.verdict == "fails"]
    if as_json:
        found = {
            "file": name,
            "holds": not failed,
            "claims": [asdict(each) for each in claims],
        }
        click.echo(json.dumps(found, indent=2))
    elif as_csv:
        echo_csv(asdict(claim) for claim in claims)
    else:
        for claim in claims:
            click.echo(f"{claim.name:<8}  {claim.verdict:<11}  {claim.finding}")
    if failed:
        raise VerificationError(
            f"{name} does not hold {len(failed)} of its {len(claims)} claims: {', '.join(failed)}.",
            hint="Make the file again, or copy it again from where it is whole.",
        )
