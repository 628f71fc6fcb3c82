"""What stands under a name may be no file that this user can read; a reader says so."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fuzz_kinds
import pytest

from ensemble_kit.errors import CheckpointError, EnsembleKitError
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.store.selection_file import read_selection
from ensemble_kit.store.workspace import RunFolder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may enter, as ``tmp_path`` is not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextmanager
def another_user() -> Iterator[None]:
    """Read as a user who may not read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def unreadable(path: Path, original: bytes) -> None:
    path.write_bytes(original)
    path.chmod(0)


def in_a_closed_folder(path: Path, original: bytes) -> None:
    path.write_bytes(original)
    path.parent.chmod(0)


def empty(path: Path, _: bytes) -> None:
    path.touch()


def a_folder(path: Path, _: bytes) -> None:
    path.mkdir()


def missing(path: Path, _: bytes) -> None:
    assert not path.exists()


def a_link_to_nothing(path: Path, _: bytes) -> None:
    path.symlink_to("nothing")


def a_link_to_itself(path: Path, _: bytes) -> None:
    path.symlink_to(path.name)


# Their ``read`` writes or copies files itself, or takes a missing file for one without lines.
LEFT_OUT = frozenset({"log", "ids", "npy", "selection", "state"})
WAYS = [
    unreadable,
    in_a_closed_folder,
    empty,
    a_folder,
    missing,
    a_link_to_nothing,
    a_link_to_itself,
]


@pytest.mark.parametrize("name", [name for name in fuzz_kinds.NAMES if name not in LEFT_OUT])
@pytest.mark.parametrize("make", WAYS)
def test_what_cannot_be_read_is_an_error_of_the_kit(make, name, kinds, folder):
    kind = kinds[name]
    path = folder / "closed" / kind.file_name
    path.parent.mkdir(parents=True)
    path.write_bytes(kind.originals[0])
    kind.read(path)  # whatever has to be imported is
    for written in path.parent.iterdir():
        written.unlink()
    make(path, kind.originals[0])

    with another_user(), pytest.raises(EnsembleKitError):
        kind.read(path)


@pytest.mark.parametrize("read", [read_selection, read_predictions])
@pytest.mark.parametrize("make", WAYS)
def test_nor_are_selections_and_arrays(make, read, kinds, folder):
    original = kinds["npy" if read is read_predictions else "selection"].originals[0]
    path = folder / "closed" / "p.npy"
    path.parent.mkdir(parents=True)
    make(path, original)

    with another_user(), pytest.raises(EnsembleKitError):
        read(path)


def test_checkpoints_in_a_closed_folder_are_not_taken_for_none(folder):
    run = RunFolder(folder)
    run.checkpoints.mkdir()
    run.checkpoint(3).touch()
    run.checkpoints.chmod(0)

    with another_user(), pytest.raises(CheckpointError) as caught:
        run.checkpoint_paths()

    run.checkpoints.chmod(0o700)
    assert str(caught.value) == (
        f"{run.checkpoints} cannot be read: Permission denied.\n"
        "Name the folder of a run that you may read."
    )
