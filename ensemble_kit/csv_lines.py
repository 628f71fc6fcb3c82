"""CSV files of one line for each video: its id, and what is said of it."""

import csv
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from ensemble_kit.errors import EnsembleKitError, shown
from ensemble_kit.gzipped import open_text
from ensemble_kit.texts import MAX_CHARACTERS

LABELS_HEADER = "VideoId,Labels"
MAX_DIGITS = 18  # of a class index: Python reads no number of more than 4,300


def id_lines(
    path: Path,
    headers: Sequence[str],
    *,
    error_type: type[EnsembleKitError],
    nouns: tuple[str, str] = ("video", "videos"),
) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the id and the rest of each line, after checking header and ids.

    Fields in quotation marks are read as RFC 4180 says: they may hold commas, line ends and, two
    for one, quotation marks. The place names the line that a row starts on.

    Args:
        path: The file, in UTF-8, gzipped or not.
        headers: What the first line may be; the first of them is named in messages.
        error_type: What to raise.
        nouns: What messages call what a line is of: one of them, and several.

    Raises:
        EnsembleKitError: Of the type that was asked for: the file cannot be read, or one of its
            lines is not what it should be.
    """
    line_of: dict[str, int] = {}
    try:
        with open_text(path, newline="") as file:
            lines = enumerate(iter(lambda: file.readline(MAX_CHARACTERS), ""), start=1)
            _check_header(next(lines, (1, ""))[1], headers, path, error_type)
            for number, line in lines:
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                following = (text for _, text in lines)
                video, text = _fields(line, following, where, headers[0], error_type)
                if line_of.setdefault(video, number) != number:
                    raise error_type(
                        f"{where}: {nouns[0]} {shown(video)} is on line {line_of[video]} already.",
                        hint=f"Keep one line for each {nouns[0]}.",
                    )
                yield where, video, text
    except OSError as error:
        raise error_type(
            f"{path} cannot be read: {error.strerror}.", hint="Name a file that you may read."
        ) from error
    except UnicodeDecodeError as error:
        raise error_type(
            f"{path} is not text in UTF-8.", hint="Name a CSV file, or save it as UTF-8."
        ) from error
    if not line_of:
        raise error_type(
            f"{path} holds no {nouns[1]}.",
            hint=f"Write one line for each {nouns[0]} under the header.",
        )


def class_index(token: str, num_classes: int) -> int | None:
    """Return the class index that a text is; None where it is no number from 0 to C - 1."""
    is_number = token.isascii() and token.isdecimal() and len(token) <= MAX_DIGITS
    return int(token) if is_number and int(token) < num_classes else None


def header_of(line: str) -> str:
    """Return a file's first line without its end, and without the quotes of its names."""
    line = line.rstrip("\r\n")
    return line.replace('"', "") if line.startswith('"') else line


def _check_header(
    line: str, headers: Sequence[str], path: Path, error_type: type[EnsembleKitError]
) -> None:
    header = header_of(line)
    if header not in headers:
        first = f"the first line is {shown(header)}" if header else "there is no header"
        raise error_type(
            f"{path}: {first}, expected {headers[0]!r}.",
            hint=f"Name a file in the challenge's format, with the header {headers[0]}.",
        )


def _fields(
    line: str,
    following: Iterator[str],
    where: str,
    header: str,
    error_type: type[EnsembleKitError],
) -> tuple[str, str]:
    """Return the id and the rest of a line, and of those after it while a quotation is open.

    Lines without a quotation mark, which is nearly all of them, are not given to ``csv``: it
    refuses fields over 131,072 characters, which a video with every class of a large vocabulary
    has. That limit also ends a quotation that nobody closes.
    """
    if '"' not in line:
        video, comma, text = line.rstrip("\r\n").partition(",")
        if not comma:
            raise error_type(
                f"{where}: there is no comma in {shown(video)}.",
                hint=f"Write one line for each video: {header}.",
            )
        return video, text
    try:
        fields = next(csv.reader(chain([line], following), strict=True))
    except csv.Error as error:
        raise error_type(
            f"{where} is not CSV: {error}.",
            hint='Write an id with a comma or a quotation mark as "a ""b"", c".',
        ) from error
    if len(fields) != 2:
        raise error_type(
            f"{where}: there are {len(fields)} fields, expected 2.",
            hint=f"Write one line for each video: {header}.",
        )
    return fields[0], fields[1]
