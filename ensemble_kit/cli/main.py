"""The group of all commands: the one place where an error becomes text and an exit code."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from ensemble_kit._version import __version__
from ensemble_kit.cli.options import SuggestingGroup, add_quiet
from ensemble_kit.errors import EnsembleKitError
from ensemble_kit.interrupts import INTERRUPTED

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
        "verify": "verify",
        "report": "report",
    }
)


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

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error that the user can fix becomes ``Error: …`` and exit code 1."""
        try:
            return super().invoke(ctx)
        except EnsembleKitError as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(
    cls=KitGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "ENSEMBLE_KIT",  # ENSEMBLE_KIT_FUSE_DTYPE is `fuse --dtype`
    },
)
@click.version_option(__version__, prog_name="ensemble-kit")
@click.option("--traceback", is_flag=True, help="Show where an error was raised, for a bug report.")
def main(traceback: bool) -> None:
    """Train, average, select, fuse and export video-tagging ensembles that fit in one file.

    \b
    In a workspace with trained runs, these three commands make one ONNX file:
        ensemble-kit select
        ensemble-kit fuse --dtype bf16
        ensemble-kit export-onnx
    """  # noqa: D301 - \b is click's mark for "keep these lines"
