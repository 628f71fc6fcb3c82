"""Selection files: what ``select`` writes and ``fuse`` reads. Imports no stage."""

from pathlib import Path

from pydantic import ValidationError

from ensemble_kit.errors import SelectionError
from ensemble_kit.files import written_aside
from ensemble_kit.provenance import SelectionRecord


def read_selection(path: Path) -> SelectionRecord:
    """Read a ``selection.json`` strictly.

    Raises:
        SelectionError: The file is missing, or is not a selection of this version's form.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SelectionError(
            f"{path} cannot be read: {error.strerror}.",
            mend="Run `ensemble-kit select` first, or name a selection that exists.",
        ) from error
    try:
        return SelectionRecord.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SelectionError(
            f"{path} is not a selection{f', at {place}' if place else ''}: {first['msg']}.",
            mend="Make it again with `ensemble-kit select`.",
        ) from error


def write_selection(path: Path, selection: SelectionRecord, *, force: bool) -> None:
    """Write a selection as indented JSON.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or the disk refuses the file.
    """
    with written_aside(path, force=force) as aside:
        aside.write_text(selection.model_dump_json(indent=2) + "\n", encoding="utf-8")
