"""The command line: one command a file, each of them thin. Imports the rest of the kit late."""

from ensemble_kit.cli.main import main

__all__ = ["main"]
