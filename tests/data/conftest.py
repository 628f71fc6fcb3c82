"""Records of two modalities, small enough to be written for every test, and labels of others."""

import numpy as np
import pytest
from example_bytes import frame_record
from feature_files import write_labels

from ensemble_kit.data.schema import Modality, Schema, write_schema
from ensemble_kit.data.tfrecord import write_records


@pytest.fixture
def schema():
    """rgb 3 wide, audio 2 wide; 6 classes."""
    return Schema(
        level="frame",
        modalities=[
            Modality(name="rgb", key="rgb", width=3, value_type="uint8"),
            Modality(name="audio", key="audio", width=2, value_type="uint8"),
        ],
        id_key="id",
        labels_key="labels",
        num_classes=6,
    )


@pytest.fixture
def folder(tmp_path, schema):
    """A folder with the schema and three shards of 4, 1 and 6 videos, of 1 to 5 frames."""
    random = np.random.default_rng(0)
    number = 0
    for shard, count in enumerate([4, 1, 6]):
        records = []
        for _ in range(count):
            num_frames = int(random.integers(1, 6))
            frames = {
                name: random.integers(1, 256, (num_frames, width), np.uint8)
                for name, width in schema.widths.items()
            }
            labels = random.integers(0, 6, 2).tolist()
            records.append(frame_record(f"v{number}", labels, **frames))
            number += 1
        write_records(tmp_path / f"train{shard}.tfrecord", records, force=False)
    write_schema(schema, tmp_path / "schema.toml", force=False)
    return tmp_path


@pytest.fixture
def labels(tmp_path):
    """The labels of the videos of ``feature_files``."""
    return write_labels(tmp_path / "labels.csv")
