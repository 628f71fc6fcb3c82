"""The group of all commands: the one place where an error becomes text and an exit code."""

import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import click

from ensemble_kit._version import __version__
from ensemble_kit.cli.options import SuggestingGroup, add_quiet
from ensemble_kit.errors import EnsembleKitError, shown
from ensemble_kit.interrupts import INTERRUPTED, signals_interrupt
from ensemble_kit.wording import printable_line

# Name -> module; each module's command has the command's name, with _ for -.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "demo": "demo",
        "recipes": "recipes",
        "data": "data",
        "train": "train",
        "runs": "runs",
        "average": "average",
        "import-onnx": "import_onnx",
        "predict": "predict",
        "predictions": "predictions",
        "evaluate": "evaluate",
        "select": "select",
        "fuse": "fuse",
        "export-onnx": "export_onnx",
        "calibrate": "calibrate",
        "verify": "verify",
        "push": "push",
        "report": "report",
    }
)

# What the libraries' own errors say where the system gives no memory; they have no common class.
NO_MEMORY = (
    "failed to map segment", "annot allocate memory", "can't allocate memory", "bad_alloc",
    "not enough memory", "out of memory",
)  # fmt: skip
# What a command may end in after a signal has reached it too
EXPECTED = (EnsembleKitError, click.ClickException, click.exceptions.Exit, click.Abort)


class KitGroup(SuggestingGroup):
    """A group whose commands are imported when they are named, and whose errors are text."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ensemble_kit.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        add_quiet(command)
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; where the system refuses memory or output, one error says so."""
        try:
            return super().main(*args, **kwargs)
        except Exception as error:
            problem = _refusal_of_output(error) or _refusal_of_memory(error)
            if problem is None:
                raise
        click.echo(f"Error: {problem}", err=True)
        sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error that the user can fix becomes ``Error: …`` and exit code 1."""
        try:
            with signals_interrupt(*EXPECTED):
                return super().invoke(ctx)
        except click.NoSuchOption as error:
            raise _explained(error) from error
        except click.UsageError as error:
            raise _shortened(error) from error
        except EnsembleKitError as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


def _explained(error: click.NoSuchOption) -> click.UsageError:
    """Return the error of an unknown option, which a shell may have made of a file's name."""
    word = error.option_name
    name = next((name for name in sorted(os.listdir()) if name.startswith(word)), None)
    if name is None:
        return error
    return click.UsageError(
        f"No such option {word!r}, but there is a file {printable_line(name)}. Write "
        f"./{printable_line(name)}, or -- before the files.",
        error.ctx,
    )


def _shortened(error: click.UsageError) -> click.UsageError:
    """Return the error of words too many with the first of them: a shell may give thousands."""
    problem, _, words = error.message.partition(" (")
    if not problem.startswith("Got unexpected extra argument"):
        return error
    text = f"{problem} ({shown(words.removesuffix(')'))})."
    if ".tfrecord" in words:
        text += " Quote patterns, so that the shell does not spell them out."
    return click.UsageError(text, error.ctx)


def _refusal_of_output(error: Exception) -> str | None:
    """Say why standard output took no more, if that is what went wrong.

    All output goes through click or rich, and neither writes anything else.
    """
    if not isinstance(error, OSError) or _last_package(error) not in {"click", "rich"}:
        return None
    with suppress(OSError):  # what is left goes nowhere: Python would try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return (
        f"Standard output cannot be written: {error.strerror}.\n"
        "Free some space, or send it elsewhere."
    )


def _last_package(error: Exception) -> str:
    """Return the package whose code ran when the error was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""


def _refusal_of_memory(error: BaseException | None) -> str | None:
    while error is not None:
        is_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
        text = str(error)
        if isinstance(error, MemoryError) or is_system or any(mark in text for mark in NO_MEMORY):
            return (
                "There is not enough memory.\n"
                "Free some, or raise the limit (`ulimit -v`); smaller batches and fewer processes "
                "need less."
            )
        error = error.__cause__ or error.__context__
    return None


@click.group(
    cls=KitGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "ENSEMBLE_KIT",  # ENSEMBLE_KIT_FUSE_DTYPE is `fuse --dtype`
    },
)
@click.version_option(__version__, prog_name="ensemble-kit")
@click.option("--traceback", is_flag=True, help="Show where an error was raised, for a bug report.")
@click.option("--verbose", is_flag=True, help="Say on stderr when files are opened and written.")
@click.pass_context
def main(ctx: click.Context, traceback: bool, verbose: bool) -> None:
    """Train, average, select, fuse and export video-tagging ensembles that fit in one file.

    \b
    In a workspace with trained runs, these three commands make one ONNX file:
        ensemble-kit select
        ensemble-kit fuse --dtype bf16
        ensemble-kit export-onnx
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    if verbose:
        handler = _ToStandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        logger = logging.getLogger("ensemble_kit")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        ctx.call_on_close(partial(logger.removeHandler, handler))


class _ToStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a record on one line; names of files may hold what steers a terminal."""
        click.echo(printable_line(self.format(record)), err=True)
