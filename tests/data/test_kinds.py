from pathlib import Path

import numpy as np
import pytest
from example_bytes import byte_strings, floats, frame_record, integers, record

from ensemble_kit.data.kinds import KINDS, find_schema, title_of
from ensemble_kit.errors import RecordError

PATH = Path("a.tfrecord")
WRITE_A_SCHEMA = "Write a schema TOML for these records and name it with --schema."


def known_record(level, id_key, keys):
    """A record with these keys: 2 features in the first modality, 3 in the second."""
    context = {id_key: byte_strings(b"v"), "labels": integers([1])}
    if level == "video":
        values = {key: floats([0.5] * width) for width, key in enumerate(keys, start=2)}
        return record(context | values)
    return record(
        context | {"start_time_seconds": floats([0])},
        {key: [byte_strings(bytes(width))] for width, key in enumerate(keys, start=2)},
    )


@pytest.mark.parametrize(
    ("level", "id_key", "keys", "names", "num_classes", "title"),
    [
        ("frame", "id", ["rgb", "audio"], ["rgb", "audio"], 3862, "YouTube-8M frame level (2018)"),
        (
            "frame",
            "video_id",
            ["rgb", "audio"],
            ["rgb", "audio"],
            4716,
            "YouTube-8M frame level (2017)",
        ),
        (
            "video",
            "id",
            ["mean_rgb", "mean_audio"],
            ["rgb", "audio"],
            3862,
            "YouTube-8M video level (2018)",
        ),
        (
            "video",
            "video_id",
            ["mean_rgb", "mean_audio"],
            ["rgb", "audio"],
            4716,
            "YouTube-8M video level (2017)",
        ),
        ("frame", "video_id", ["audio_embedding"], ["audio"], 527, "AudioSet frame level"),
    ],
)
def test_each_known_kind_is_told_by_its_keys(level, id_key, keys, names, num_classes, title):
    schema = find_schema(known_record(level, id_key, keys), path=PATH)

    assert schema.level == level
    assert (schema.id_key, schema.labels_key) == (id_key, "labels")
    assert [modality.key for modality in schema.modalities] == keys
    value_type = "float32" if level == "video" else "uint8"
    assert schema.interface == tuple(
        (name, width, value_type) for width, name in enumerate(names, start=2)
    )
    assert schema.num_classes == num_classes
    assert title_of(schema) == title
    assert len(KINDS) == 5


def test_a_schema_of_its_own_is_called_so():
    schema = find_schema(
        frame_record(rgb=np.ones((1, 2), np.uint8), audio=np.ones((1, 2), np.uint8)), path=PATH
    )

    renamed = schema.model_copy(update={"id_key": "name"})

    assert title_of(renamed) == "frame level, not a published layout"


@pytest.mark.parametrize(
    ("first", "problem"),
    [
        (
            frame_record(flow=np.ones((1, 2), np.uint8)),
            "its keys are of no known kind (found context id, labels; feature lists flow).",
        ),
        (
            frame_record(rgb=[], audio=[]),
            "it has no frame to derive a schema from.",
        ),
        (b"\xff\xff", "it has no frame to derive a schema from."),
    ],
)
def test_a_record_of_no_known_kind_asks_for_a_schema(first, problem):
    with pytest.raises(RecordError) as error:
        find_schema(first, path=PATH, number=4)

    assert str(error.value) == f"a.tfrecord, record 4: {problem}\n{WRITE_A_SCHEMA}"
