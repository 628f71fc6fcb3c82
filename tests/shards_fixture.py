"""Records in four files and a model for them; ``conftest`` lends the fixtures."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ensemble_kit.data.dataset import Records

NUM_SHARDS = 4


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of records in four files, and two models for them."""
    from builders import tiny_recipe, write_checkpoint

    from ensemble_kit.data.synthetic import synthesize

    folder = tmp_path_factory.mktemp("shards")
    schema = synthesize(
        folder,
        num_videos={"test": 40},
        modalities={"rgb": 8, "audio": 4},
        num_classes=5,
        frames=(2, 7),
        num_shards=NUM_SHARDS,
    )
    write_checkpoint(folder / "model.safetensors", tiny_recipe(), schema, name="mine")
    write_checkpoint(folder / "other.safetensors", tiny_recipe(), schema, seed=1)
    return folder


@pytest.fixture
def shard_records(shards: Path) -> "Records":
    """The records of ``shards``, just opened."""
    from ensemble_kit.data.dataset import Records

    return Records([shards / "test"])
