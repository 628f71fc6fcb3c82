"""A folder of predictions: a file for each file of records, and a list of what there should be.

``predictions.json`` lists the files that belong to the folder, so that one which is not there yet
is missed. Any number of processes write the folder, each its own files; whoever is asked for a file
that is not in the list adds it, and files are never taken from it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from os.path import isfile
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ensemble_kit.errors import PredictionsError
from ensemble_kit.files import written_aside
from ensemble_kit.wording import counted

LIST = "predictions.json"
SUFFIX = ".safetensors"


class _List(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    files: list[Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]]


def list_files(folder: Path, names: Iterable[str]) -> None:
    """Let the list of a folder have some files beside those that are in it.

    Raises:
        OutputError: The disk refuses it.
        PredictionsError: The list that is there is damaged.
    """
    with _locked(folder):
        known = set(_listed(folder)) if isfile(folder / LIST) else set()
        wanted = known.union(names)
        if wanted != known:
            with written_aside(folder / LIST, force=True) as aside:
                text = json.dumps({"files": sorted(wanted)}, indent=0)
                aside.write_text(f"{text}\n", encoding="utf-8")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from the list, where the system and the disk know locks.

    Of two that read the list before either writes it, the second would take away what the first
    has added.
    """
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # what cannot be written is refused a line later
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def shard_paths(folder: Path) -> list[Path]:
    """Return the predictions files of a folder, sorted by name.

    Raises:
        PredictionsError: The folder holds no predictions, or lacks some that it should have.
    """
    if not isfile(folder / LIST):
        raise PredictionsError(
            f"{folder} is no folder of predictions: it holds no {LIST}.",
            hint="Name a predictions file, or a folder that `ensemble-kit predict` wrote.",
        )
    paths = [folder / name for name in sorted(_listed(folder))]
    missing = [path.name for path in paths if not isfile(path)]
    if missing or not paths:
        raise PredictionsError(
            f"{folder} lacks {len(missing):,} of {counted(len(paths), 'file')}, such as "
            f"{missing[0] if missing else 'any'}.",
            hint="Run the same `ensemble-kit predict` again; it resumes with what is missing.",
        )
    return paths


def _listed(folder: Path) -> Sequence[str]:
    try:
        return _List.model_validate_json((folder / LIST).read_bytes()).files
    except (ValidationError, OSError) as error:
        raise PredictionsError(
            f"{folder / LIST} cannot be read as a list of predictions files.",
            hint="Remove it, and run the same `ensemble-kit predict` again.",
        ) from error


def differing(facts: Iterable[tuple[str, object, object]]) -> str | None:
    """Return the name of the first fact whose two values differ, or None."""
    return next((name for name, ours, theirs in facts if ours != theirs), None)
