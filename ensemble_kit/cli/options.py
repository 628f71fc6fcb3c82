"""Arguments and options that several commands share."""

import csv
import difflib
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from ensemble_kit.choices import CACHE_BYTES, DEVICE, MAX_GAP_LOSS, MAX_SIZE, ON_HUB, Device, Dtype
from ensemble_kit.errors import InputError
from ensemble_kit.files import parse_size
from ensemble_kit.wording import counted, printable_line

F = TypeVar("F", bound=Callable[..., Any])


class SuggestingGroup(click.Group):
    """A group that names the command which was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that was named, or end with the nearest one."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            begun = [name for name in names if name.startswith(args[0])]  # export, import
            near = begun or difflib.get_close_matches(args[0], names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


def add_quiet(command: click.Command) -> None:
    """Give a command, or every command of a group, the option ``--quiet`` unless it has it."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            add_quiet(each)
    elif all("--quiet" not in option.opts for option in command.params):
        command.params.append(
            click.Option(
                ["--quiet"], is_flag=True, expose_value=False, callback=_be_quiet,
                help="Show no progress.",
            )
        )  # fmt: skip


def _be_quiet(ctx: click.Context, _: click.Parameter, is_quiet: bool) -> None:
    if is_quiet:
        from ensemble_kit.progress import quietly

        ctx.with_resource(quietly())


class Existing(click.ParamType[Path]):
    """A path that must exist; one that does not is an error of the input, not of the usage."""

    name = "FILE"

    def __init__(self, *, or_folder: bool = False) -> None:
        self.or_folder = or_folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, or raise ``InputError``."""
        path = Path(value)
        # os.path's functions take any name, such as one too long for the system
        if not os.path.isfile(path) and not (self.or_folder and os.path.isdir(path)):
            kind = "is not a file" if os.path.exists(path) else "does not exist"
            wanted = "file or folder" if self.or_folder else "file"
            raise InputError(f"{path} {kind}.", hint=f"Name a {wanted} that exists.")
        return path


class ExistingOrOnHub(Existing):
    """A file that must exist, or the name of one on the Hugging Face Hub as it was written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, or raise ``InputError``."""
        return Path(value) if str(value).startswith(ON_HUB) else super().convert(value, param, ctx)


def complete_recipes(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """Return the names of shipped recipes that a shell may complete a word to."""
    from ensemble_kit.recipes.reading import recipe_names

    return [name for name in recipe_names() if name.startswith(begun)]


EXISTING_FILE = Existing()
EXISTING_FILE_OR_ON_HUB = ExistingOrOnHub()
EXISTING_FILE_OR_FOLDER = Existing(or_folder=True)
FILE = click.Path(dir_okay=False, path_type=Path)
STDOUT = "-"  # as an output
FOLDER = click.Path(file_okay=False, path_type=Path)


def one_of(literal: Any) -> click.Choice[str]:
    """Return the choice among the values of a ``Literal``, which the library checks them by."""
    return click.Choice(get_args(literal))


force_option = click.option("--force", is_flag=True, help="Replace what exists already.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _only_form(ctx: click.Context, param: click.Parameter, is_given: bool) -> bool:
    if is_given and (ctx.params.get("as_json") or ctx.params.get("as_csv")):  # the one before it
        raise click.UsageError("Output is JSON or CSV; give --json or --csv.")
    return is_given


def table_options(command: F) -> F:
    """Add ``--json`` and ``--csv`` to a command that prints a table."""
    for option in (
        click.option(
            "--csv", "as_csv", is_flag=True, callback=_only_form, help="Print the table as CSV."
        ),
        click.option(
            "--json", "as_json", is_flag=True, callback=_only_form, help="Print one JSON object."
        ),
    ):
        command = option(command)
    return command


device_option = click.option(
    "--device", type=one_of(Device), default=DEVICE, show_default=True, help="Where models run."
)
repeats_option = click.option(
    "--repeats", type=click.IntRange(min=1),
    help="Random frame samples averaged  [default: 1, or as an ONNX file was exported].",
)  # fmt: skip
max_size_option = click.option(
    "--max-size",
    default=f"{MAX_SIZE // 2**30}GiB",
    show_default=True,
    metavar="SIZE",
    help="Maximum file size: 1GiB is 2^30 bytes, 1GB is 10^9 bytes, 995MiB ...",
)


def max_gap_loss_option(help: str) -> Callable[[F], F]:  # noqa: A002 - click's word
    """Return the option of commands that compare GAP with what it was, explained by ``help``."""
    return click.option(
        "--max-gap-loss",
        type=click.FloatRange(min=0),
        default=MAX_GAP_LOSS,
        show_default=True,
        help=help,
    )


def parse_dtypes(text: str, option: str, *, or_auto: bool = False) -> tuple[Dtype, ...]:
    """Read precisions with commas between, as ``int8,int4``.

    Args:
        text: The value of an option.
        option: What the error calls it.
        or_auto: Whether the error names ``auto`` too.

    Raises:
        InputError: Some part is no precision.
    """
    known: tuple[Dtype, ...] = get_args(Dtype)
    dtypes = []
    for part in text.split(","):
        found = next((dtype for dtype in known if dtype == part.strip()), None)
        if found is None:
            raise InputError(
                f"{part.strip()!r} in {option} {text} is no precision.",
                hint=f"Name some of {', '.join(known)}, with commas between"
                f"{', or auto' if or_auto else ''}.",
            )
        dtypes.append(found)
    return tuple(dict.fromkeys(dtypes))


def _parsed_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    return parse_size(value)


def echo_json(result: object) -> None:
    """Print a stage's result as one JSON object; paths are written as text."""
    click.echo(json.dumps(_plain(result), ensure_ascii=False))


def echo_csv(rows: Iterable[Mapping[str, object]]) -> None:
    """Print rows as CSV: a header, numbers in full, nothing where there is no value.

    Args:
        rows: At least one; all have the columns of the first, in its order.
    """
    table = [dict(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in table)
    click.echo(text.getvalue(), nl=False)


def _cell(value: object) -> object:
    """Return a value as it stands in CSV; of text, what would steer a terminal is escaped."""
    return printable_line(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if hasattr(value, "model_dump"):  # pydantic's, which is not imported for the help
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def records_options(command: F) -> F:
    """Add the options of commands that read records, named as the arguments of ``Records``."""
    for option in (
        click.option(
            "--cache-size", "cache_bytes", default=f"{CACHE_BYTES // 2**30}GiB", show_default=True,
            metavar="SIZE", callback=_parsed_size,
            help="Maximum size of that folder; the shards used longest ago are removed first.",
        ),
        click.option(
            "--cache", type=FOLDER,
            help="Folder for records at URLs  [default: ~/.cache/ensemble-kit].",
        ),
        click.option(
            "--skip-bad-records", is_flag=True, help="Skip damaged records, and count them."
        ),
        click.option(
            "--no-crc", "check_crc", is_flag=True, flag_value=False, default=True,
            help="Do not compare checksums.",
        ),
        click.option(
            "--label-names", type=EXISTING_FILE,
            help="Names of the classes: YouTube-8M's or AudioSet's CSV file, or one name a line.",
        ),
        click.option(
            "--schema", type=EXISTING_FILE,
            help="Schema TOML  [default: schema.toml in the records' folder or above, or "
            "their keys].",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def words_of(ctx: click.Context, *, leave_out: Collection[str] = ()) -> list[str]:
    """Return the words that give another process the options which this command was given.

    Args:
        ctx: The command's context.
        leave_out: Options left out, by the names of their parameters.
    """
    words = []
    for option in ctx.command.params:
        name = option.name or ""
        is_default = ctx.get_parameter_source(name) is ParameterSource.DEFAULT
        if not isinstance(option, click.Option) or is_default or name in leave_out:
            continue
        # only --quiet has no value here, since its callback has acted on it
        value, word = ctx.params.get(name, True), max(option.opts, key=len)
        if option.is_flag:
            is_off = option.secondary_opts and not value
            words.append(option.secondary_opts[0] if is_off else word)
        else:
            words += [f"{word}={one}" for one in (value if option.multiple else [value])]
    return words


def echo_skipped(*reads: Any) -> None:
    """Say on stderr how many bad records were skipped, if any; ``reads`` are ``Records``."""
    count = sum(records.num_skipped for records in reads)
    if count:
        was = "was" if count == 1 else "were"
        click.echo(f"{counted(count, 'bad record')} {was} skipped.", err=True)
