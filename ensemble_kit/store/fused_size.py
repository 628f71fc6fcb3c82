"""What a fused file takes, to the byte, before it is written.

A fused file is a header and tensors. Its header has room for the longest numbers that each entry
can have, so that a member takes the same bytes whatever members are beside it, in which order, and
however they are mixed. The file takes the sum of its members' bytes and of what they share: the
schema with its classes, and what the file says of itself.

Paths have room in steps of ``PATH_ROOM`` bytes: a member takes the same bytes wherever the file
lies, unless the path from there to its checkpoint is longer than that.
"""

import json
from collections.abc import Mapping
from typing import get_args

from ensemble_kit.choices import MAX_CLASSES, Metric
from ensemble_kit.data.schema import Schema
from ensemble_kit.store.provenance import (
    NO_HASH,
    FileMetadata,
    FusedMetadata,
    MemberMetadata,
    Metadata,
    ValidationMetadata,
)
from ensemble_kit.store.tensor_files import TensorSpec, header_entry, header_of

ALIGNMENT = 8  # safetensors begins the first tensor at a multiple of it
PATH_ROOM = 256
VERSION_ROOM = 32
LONGEST_FLOAT = 2.2250738585072014e-308
LONGEST_METRIC: Metric = max(get_args(Metric), key=len)
LONGEST_COUNT = 2**53
NO_FILE = FileMetadata(path="", sha256=NO_HASH)


def member_bytes(specs: Mapping[str, TensorSpec], metadata: MemberMetadata) -> int:
    """Return what a member takes in all: its tensors, and its part of the header."""
    return member_room(specs, metadata) + sum(spec.num_bytes for spec in specs.values())


def member_room(specs: Mapping[str, TensorSpec], metadata: MemberMetadata) -> int:
    """Return the bytes of the header that a member takes.

    Args:
        specs: The type and shape of each of its tensors, by their names in the fused file.
        metadata: What the file says of it; its coefficient does not count.
    """
    longest = metadata.model_copy(
        update={
            "coefficient": LONGEST_FLOAT,
            "num_values": LONGEST_COUNT,
            "checkpoint": NO_FILE.model_copy(update={"sha256": metadata.checkpoint.sha256}),
        }
    )
    entries = sum(
        len(json.dumps({name: header_entry(spec, LONGEST_COUNT, LONGEST_COUNT)}))
        for name, spec in specs.items()
    )
    return _aligned(entries + _length(longest) + _path_room(metadata.checkpoint))


def shared_bytes(schema: Schema, selection: FileMetadata | None = None) -> int:
    """Return the bytes that a fused file takes beside those of its members.

    Args:
        schema: The members' schema.
        selection: The selection that the file is fused from; None before there is one.
    """
    longest = FusedMetadata.model_construct(
        kit_version="0" * VERSION_ROOM,
        members=(),
        data_schema=schema,
        selection=NO_FILE,
        validation=ValidationMetadata(
            metric=LONGEST_METRIC,
            score=LONGEST_FLOAT,
            k=MAX_CLASSES,
            videos=LONGEST_COUNT,
            dataset_sha256=NO_FILE.sha256,
            repeats=100_000,
            is_refit=False,  # one letter longer than true
        ),
        top_k=MAX_CLASSES,
        content_sha256=NO_FILE.sha256,
    )
    return _aligned(len(header_of((), longest)) + _path_room(selection or NO_FILE))


def _length(metadata: Metadata) -> int:
    """Return how long metadata are as a part of the metadata in a header: JSON within JSON."""
    return len(json.dumps(metadata.model_dump_json(by_alias=True)))


def _path_room(file: FileMetadata) -> int:
    without = _length(file.model_copy(update={"path": ""}))
    return max(1, -(-(_length(file) - without) // PATH_ROOM)) * PATH_ROOM


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
