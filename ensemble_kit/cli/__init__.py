"""The command line: one command a file, each of them thin."""

from ensemble_kit.cli.main import main

__all__ = ["main"]
