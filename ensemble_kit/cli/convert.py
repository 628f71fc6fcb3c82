"""ensemble-kit data convert."""

from typing import Any

import click

from ensemble_kit.choices import SPLIT
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    FOLDER,
    echo_json,
    force_option,
    json_option,
)
from ensemble_kit.wording import counted


def _parsed_split(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, float]:
    from ensemble_kit.data.conversion import parse_split

    return parse_split(value)


@click.command()
@click.argument("features", metavar="FEATURES...", nargs=-1, required=True)
@click.option(
    "--labels", required=True, type=EXISTING_FILE, help="CSV file with the header VideoId,Labels."
)
@click.option("-o", "--output", "folder", required=True, type=FOLDER, help="Folder to make.")
@click.option(
    "--label-names", type=EXISTING_FILE,
    help="Names of the classes, a CSV file or one name a line; labels may then be names, "
    "separated by semicolons.",
)  # fmt: skip
@click.option(
    "--split", default=SPLIT, show_default=True, callback=_parsed_split,
    help="Share of each split; a hash of the id decides.",
)  # fmt: skip
@click.option(
    "--quantise", "quantised", is_flag=True,
    help="Store floats as bytes, as the challenge did, and print the error.",
)  # fmt: skip
@force_option
@json_option
def convert(features: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Write records of your own FEATURES and labels.

    FEATURES are files or folders: .npy of one video each, whose name is the id; .npz, .h5 or
    .parquet with ids and an array for each modality; MediaPipe's .pb; TFRecords. With
    NAME=PATH, files of one array hold the modality NAME; those of several modalities are joined
    by video id.

    \b
    Examples:
        ensemble-kit data convert rgb=rgb/ audio=audio/ --labels labels.csv -o records
        ensemble-kit data convert features.h5 --labels labels.csv --quantise -o records
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.conversion import convert as write

    converted = write(features, **options)
    if as_json:
        echo_json(converted)
        return
    click.echo(converted.folder)
    for split, count in converted.videos.items():
        click.echo(f"{split:14} {counted(count, 'video')}")
    click.echo(f"{'classes':14} {converted.schema.num_classes:,}")
    if converted.num_cut:
        click.echo(
            f"{counted(converted.num_cut, 'video')} cut to the modality with the fewest frames"
        )
    for name, error in converted.quantisation.items():
        click.echo(
            f"{name:14} quantisation error {error.rms:.4f} (root mean square), {error.largest:.4f} "
            f"at most; {error.clipped:.3%} of the values lie outside -2 to 2"
        )
