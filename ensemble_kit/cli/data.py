"""ensemble-kit data: make, describe, check and synthesize records."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ensemble_kit.choices import (
    LEVEL,
    MAX_CLASSES,
    MAX_LENGTH,
    MAX_WIDTH,
    SEED,
    SYNTHETIC_CLASSES,
    SYNTHETIC_FRAMES,
    SYNTHETIC_LABEL_SKEW,
    SYNTHETIC_SHARDS,
    SYNTHETIC_VIDEOS,
    SYNTHETIC_WIDTHS,
    Level,
)
from ensemble_kit.cli.convert import convert
from ensemble_kit.cli.download import download
from ensemble_kit.cli.options import (
    FOLDER,
    SuggestingGroup,
    echo_json,
    echo_skipped,
    force_option,
    json_option,
    one_of,
    records_options,
)
from ensemble_kit.errors import shown
from ensemble_kit.wording import counted, printable, printable_line

F = TypeVar("F", bound=Callable[..., Any])
NUM_CLASSES_SHOWN = 5


class Pair(click.ParamType[tuple[str, int]]):
    """A name and a number, such as ``rgb=1024``."""

    name = "NAME=WIDTH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Split the text at its last ``=``."""
        from ensemble_kit.data.schema import GRAPH_NAMES, MODALITY_NAME

        name, _, number = value.rpartition("=")
        width = _whole_number(number, MAX_WIDTH)
        if not re.match(MODALITY_NAME, name) or width is None:
            self.fail(f"{shown(value)} is not a name and a width, such as rgb=1024.", param, ctx)
        if name in GRAPH_NAMES:
            self.fail(f"no modality may be named {name}, as the models' files use it.", param, ctx)
        return name, width


class Range(click.ParamType[tuple[int, int]]):
    """The fewest and the most, such as ``20:60``; one number is both."""

    name = "MIN:MAX"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Split the text at its colon."""
        low, _, high = value.partition(":")
        most = _whole_number(high or low, MAX_LENGTH)
        fewest = _whole_number(low, most or 1)
        if fewest is None or most is None:
            self.fail(f"{shown(value)} is not a range of frames, such as 20:60.", param, ctx)
        return fewest, most


def _whole_number(text: str, most: int) -> int | None:
    """Return a number from 1 to ``most`` as its digits write it, or None for any other text."""
    if not text.isdecimal() or len(text) > len(str(most)):  # Python converts 4,300 digits at most
        return None
    return int(text) if 1 <= int(text) <= most else None


@click.group(cls=SuggestingGroup)
def data() -> None:
    """Make, describe, check and synthesize records."""


data.add_command(convert)
data.add_command(download)


@data.command()
@click.argument("patterns", metavar="PATTERN...", nargs=-1, required=True)
@records_options
@json_option
def info(patterns: tuple[str, ...], as_json: bool, **reading: Any) -> None:
    """Describe the records of files, globs or folders.

    \b
    Example:
        ensemble-kit data info 'records/train/*.tfrecord'
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.data.summary import summarise

    records = Records(patterns, needs_labels=False, **reading)
    summary = summarise(records)
    echo_skipped(records)
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    modalities = (f"{name} {width} {kind}" for name, width, kind in records.schema.interface)
    frequent = summary["classes"][:NUM_CLASSES_SHOWN]
    for name, value in {
        "kind": summary["kind"],
        "modalities": ", ".join(modalities),
        "classes": f"{summary['num_classes']}, {len(summary['classes'])} of them seen",
        "files": f"{summary['files']:,}",
        "records": f"{summary['records']:,}",
        "frames": "{total:,}; {min} to {max} a video, {mean:.1f} on average".format(
            **summary["frames"]
        ),
        "labels": "{total:,}; {min} to {max} a video, {mean:.1f} on average".format(
            **summary["labels"]
        ),
        "unlabelled": f"{counted(summary['unlabelled'], 'record')} without a key of labels"
        if summary["unlabelled"]
        else "",
        "most frequent": ", ".join(f"{c['name']} ({c['videos']:,})" for c in frequent),
    }.items():
        if value:
            click.echo(printable_line(f"{name:14} {value}"))


@data.command()
@click.argument("patterns", metavar="PATTERN...", nargs=-1, required=True)
@records_options
@json_option
def check(patterns: tuple[str, ...], as_json: bool, **reading: Any) -> None:
    """Read all records and stop at a bad one.

    Both checksums of each record are compared, and every value is checked against the schema.
    With --skip-bad-records, all records are read, and each kind of problem is counted and shown
    with its first record. Ids that several records have are counted, and the first ones named with
    their places: a video in both train and validate would spoil every score.

    \b
    Example:
        ensemble-kit data check --skip-bad-records 'records/*/*.tfrecord'
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.data.summary import check_records

    records = Records(patterns, needs_labels=False, **reading)
    found = check_records(records)
    first = {error.kind: error for error in reversed(records.skipped)}
    kinds = Counter(error.kind for error in records.skipped).most_common()
    if as_json:
        echo_json(
            {
                "good": found.num_good,
                "unlabelled": found.num_unlabelled,
                "files": len(records.paths),
                "repeated": found.num_repeated,
                "repeats": found.repeats,
                "bad": [
                    {"kind": kind, "records": count, "first": first[kind].problem}
                    for kind, count in kinds
                ],
            }
        )
        return
    click.echo(f"{counted(found.num_good, 'good record')} in {counted(len(records.paths), 'file')}")
    if found.num_unlabelled:
        click.echo(f"{counted(found.num_unlabelled, 'record')} without labels, as test records are")
    if found.num_repeated:
        click.echo(f"{counted(found.num_repeated, 'id')} of more than one record; the first:")
    for repeat in found.repeats:
        places = ", ".join(f"{path} (record {number})" for path, number in repeat.places)
        click.echo(printable(f"  {repeat.id!r} in {places}"))
    for kind, count in kinds:
        click.echo(printable(f"{count:,} with {kind}; the first: {first[kind].problem}"))
    echo_skipped(records)


def split_options(command: F) -> F:
    """Add an option for the number of videos of each split."""
    for split, count in reversed([*SYNTHETIC_VIDEOS.items()]):
        command = click.option(
            f"--{split}", default=count, show_default=True, type=click.IntRange(min=0),
            help=f"Videos in {split}.",
        )(command)  # fmt: skip
    return command


@data.command()
@click.argument("folder", type=FOLDER)
@split_options
@click.option(
    "--modality", "modalities", type=Pair(), multiple=True,
    default=tuple(f"{name}={width}" for name, width in SYNTHETIC_WIDTHS.items()),
    show_default=True, help="Name and width; may be repeated. YouTube-8M has rgb=1024, audio=128.",
)  # fmt: skip
@click.option(
    "--classes", default=SYNTHETIC_CLASSES, show_default=True,
    type=click.IntRange(1, MAX_CLASSES), help="Number of classes.",
)  # fmt: skip
@click.option(
    "--label-skew", default=SYNTHETIC_LABEL_SKEW, show_default=True, type=click.FloatRange(min=0),
    help="Class c is drawn in proportion to (c + 1) ** -SKEW.",
)  # fmt: skip
@click.option(
    "--frames",
    default="{}:{}".format(*SYNTHETIC_FRAMES),
    show_default=True,
    type=Range(),
    help="Fewest and most frames of a video.",
)
@click.option(
    "--level", default=LEVEL, show_default=True, type=one_of(Level),
    help="Quantised frames, or their mean as floats: one vector for each video.",
)  # fmt: skip
@click.option(
    "--shards",
    default=SYNTHETIC_SHARDS,
    show_default=True,
    type=click.IntRange(min=1),
    help="Files for each split.",
)
@click.option(
    "--seed", default=SEED, show_default=True, type=click.IntRange(min=0),
    help="Seed of whatever is drawn.",
)  # fmt: skip
@force_option
@json_option
def synthesize(
    folder: Path,
    modalities: tuple[tuple[str, int], ...],
    classes: int,
    label_skew: float,
    frames: tuple[int, int],
    level: Level,
    shards: int,
    seed: int,
    force: bool,
    as_json: bool,
    **splits: int,
) -> None:
    """Write synthetic records to FOLDER.

    They are TFRecords in the challenge's format, with classes that suit different sub-models. The
    same options give the same bytes.

    \b
    Example:
        ensemble-kit data synthesize records --train 2000 --modality rgb=64 --modality audio=16
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.synthetic import synthesize as write

    write(
        folder,
        num_videos={split: count for split, count in splits.items() if count},
        modalities=dict(modalities),
        num_classes=classes,
        label_skew=label_skew,
        frames=frames,
        level=level,
        num_shards=shards,
        seed=seed,
        force=force,
    )
    if as_json:
        echo_json({"path": folder, "videos": splits})
        return
    click.echo(folder)
