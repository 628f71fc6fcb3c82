"""ensemble-kit data download."""

from pathlib import Path
from typing import Any

import click

from ensemble_kit.choices import DOWNLOAD_JOBS, DOWNLOAD_PART, MIRROR, Mirror
from ensemble_kit.cli.options import FOLDER, SuggestingGroup, echo_json, json_option, one_of
from ensemble_kit.wording import counted

output_option = click.option(
    "-o", "--output", "folder", required=True, type=FOLDER, help="Folder to fill."
)
mirror_option = click.option(
    "--mirror", type=one_of(Mirror), default=MIRROR, show_default=True, help="The server's region."
)
base_url_option = click.option(
    "--base-url", metavar="URL", help="A server of your own that has the same files."
)


class Part(click.ParamType[tuple[int, int]]):
    """Which part of how many, such as ``1,100``."""

    name = "M,N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Split the text at its comma."""
        part, _, num_parts = value.partition(",")
        is_number = all(each.isascii() and each.isdecimal() for each in (part, num_parts))
        if len(value) > 20 or not is_number or not 1 <= int(part) <= int(num_parts):
            self.fail(f"{value!r} is no part of several, such as 1,100.", param, ctx)
        return int(part), int(num_parts)


@click.group(cls=SuggestingGroup)
def download() -> None:
    """Download YouTube-8M or AudioSet, and continue where it stopped."""


@download.command()
@click.option("--partition", required=True, help="Version, level and split, as 2/frame/train.")
@click.option(
    "--shard",
    type=Part(),
    default="{},{}".format(*DOWNLOAD_PART),
    show_default=True,
    help="Part M of N of the files.",
)
@mirror_option
@output_option
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=DOWNLOAD_JOBS, show_default=True,
    help="Files fetched at a time.",
)  # fmt: skip
@base_url_option
@json_option
def youtube8m(folder: Path, as_json: bool, **options: Any) -> None:
    """Download a part of YouTube-8M, with its schema and vocabulary.

    \b
    Example:
        ensemble-kit data download youtube8m --partition 2/frame/train --shard 1,100 -o train
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.download import download_youtube8m

    _echo(download_youtube8m(folder, **options), as_json)


@download.command()
@mirror_option
@output_option
@base_url_option
@json_option
def audioset(folder: Path, as_json: bool, **options: Any) -> None:
    """Download AudioSet's features, 2.4 GB, with their schema and class labels.

    \b
    Example:
        ensemble-kit data download audioset --mirror eu -o audioset
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.download import download_audioset

    _echo(download_audioset(folder, **options), as_json)


def _echo(downloaded: Any, as_json: bool) -> None:
    if as_json:
        echo_json({**downloaded._asdict(), "schema": downloaded.folder / "schema.toml"})
        return
    click.echo(downloaded.folder)
    click.echo(
        f"{counted(downloaded.num_files, 'file')} of records, {downloaded.num_new:,} of them new"
    )
