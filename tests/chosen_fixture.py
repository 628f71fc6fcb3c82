"""A selection of four candidates as ``select`` writes it, whose fixtures ``conftest`` lends."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ensemble_kit.store.selection_file import SelectionMetadata

NUM_VIDEOS, NUM_CLASSES = 90, 5
NAMES = ("mean", "bag", "<script>alert(1)</script>", "rnn")
CLASSES = ("Game", '<b>Bold & "brave"</b>', "Vehicle", "Concert", "Plant")


@dataclass(frozen=True)
class Chosen:
    """A selection on disk, and what it was made of.

    Attributes:
        path: Its file.
        selection: What the file holds.
        labels: ``(N, C)``, bool.
        probabilities: ``(N, C)`` of each candidate, by name.
        files: Each candidate's predictions, by name.
    """

    path: Path
    selection: "SelectionMetadata"
    labels: NDArray[np.bool_]
    probabilities: dict[str, NDArray[np.float32]]
    files: dict[str, Path]


@pytest.fixture(scope="session")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    """Four candidates, each good at its own class; nothing may write into the folder."""
    return write_chosen(tmp_path_factory.mktemp("chosen"))


@pytest.fixture
def own_chosen(tmp_path: Path) -> Chosen:
    """The same selection in a folder that the test may write into."""
    return write_chosen(tmp_path)


def write_chosen(folder: Path, **options: object) -> Chosen:
    """Write predictions of four candidates and select among them; ``options`` are ``select``'s."""
    from builders import bytes_by_dtype

    from ensemble_kit.data.labels import LabelLists
    from ensemble_kit.predictions.writing import write_predictions
    from ensemble_kit.selection.stage import select
    from ensemble_kit.store.provenance import FileMetadata, ModelMetadata

    rng = np.random.default_rng(0)
    labels = rng.random((NUM_VIDEOS, NUM_CLASSES)) < 0.35
    labels[:, -1] = np.arange(NUM_VIDEOS) < 19  # one short of what is compared by class
    difficulty = rng.random(labels.shape)
    probabilities, files = {}, {}
    for place, name in enumerate(NAMES):
        rows = 0.2 * labels + 0.2 * difficulty + 0.55 * rng.random(labels.shape)
        rows[:, place] = 0.9 * labels[:, place] + 0.1 * rows[:, place]  # alone it knows this class
        order = np.roll(np.arange(NUM_VIDEOS), place)  # each file has its own order
        files[name] = folder / "runs" / f"run-{place}.safetensors"
        probabilities[name] = rows.astype(np.float32)
        write_predictions(
            files[name],
            ids=[f"video-{video}" for video in order],
            label_names=CLASSES,
            labels=LabelLists.from_lists(np.flatnonzero(labels[video]) for video in order),
            rows=probabilities[name][order],
            name=name,
            model=ModelMetadata(
                file=FileMetadata(path=f"run-{place}/averaged.safetensors", sha256=f"{place:064d}"),
                kind="checkpoint",
                num_values=1_000_000 * (place + 1),
                bytes_by_dtype=bytes_by_dtype(2_000_000 * (place + 1)),
                repeats=1,
            ),
            force=False,
        )
    path = folder / "ensemble" / "selection.json"
    given = {"confirm": 0.5, "resamples": 20, "max_size": 19_000_000, "strategy": "greedy"}
    given |= options
    selection = select(list(files.values()), output=path, **given)
    return Chosen(path, selection, labels, probabilities, files)
