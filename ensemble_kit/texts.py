"""Text, TOML and JSON from files, read within bounds; whatever is wrong is one kind of error."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from ensemble_kit.errors import EnsembleKitError
from ensemble_kit.gzipped import open_text

MAX_CHARACTERS = 2**26  # a million label names take a third of it
LONGEST_NUMBER = 10**4_300  # Python writes none that is longer
# A key of 64 parts: tomllib takes seconds for one of 20,000, and four times as long for one of
# twice as many.
_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")


def read_text(
    path: Path,
    error_type: type[EnsembleKitError],
    *,
    hint: str,
    max_characters: int = MAX_CHARACTERS,
) -> str:
    """Return a file's text, in UTF-8 with or without a byte order mark, gzipped or not.

    Args:
        path: The file.
        error_type: What to raise.
        hint: What to do where the file cannot be read.
        max_characters: How many characters it may have.

    Raises:
        EnsembleKitError: Of the type that was asked for: the file cannot be read, is no text in
            UTF-8, or has more than ``max_characters``.
    """
    try:
        with open_text(path) as file:
            text = file.read(max_characters + 1)
    except OSError as error:
        raise error_type(f"{path} cannot be read: {error.strerror}.", hint=hint) from error
    except UnicodeDecodeError as error:
        raise error_type(f"{path} is not text in UTF-8.", hint="Save the file as UTF-8.") from error
    if len(text) > max_characters:
        raise error_type(
            f"{path} has more than {max_characters:,} characters.", hint="Name another file."
        )
    return text


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text.

    Raises:
        ValueError: It is no TOML, is nested too deeply, or has a number of over 4,300 digits.
    """
    try:
        if _DEEP_KEY.search(text):
            raise RecursionError
        values = tomllib.loads(text)
        if _has_long_number(values):
            raise ValueError
        return values
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python's own words name a function that would allow it
        raise ValueError("a number in it has more than 4,300 digits") from error


def _has_long_number(value: Any) -> bool:
    """Return whether TOML has a number that Python reads, in hexadecimal, and cannot write."""
    if isinstance(value, dict):
        return any(_has_long_number(each) for each in value.values())
    if isinstance(value, list):
        return any(_has_long_number(each) for each in value)
    return isinstance(value, int) and abs(value) >= LONGEST_NUMBER


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is no JSON, is nested too deeply, or has a number of over 4,300 digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:
        raise ValueError("a number in it has more than 4,300 digits") from error
