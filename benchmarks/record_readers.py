"""The kit and its peers as readers of records, from files to padded batches.

Each yields, without an end, how many videos it has just made arrays of.
"""

import os
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH_SIZE = 128


class Case(NamedTuple):
    """Some records; ``streams`` has key and width of each modality."""

    title: str
    files: list[str]
    level: str
    id_key: str
    streams: list[tuple[str, int]]
    video_bytes: float


def read_ours(case: Case, cores: int, *, num_chosen: int | None = None) -> Iterator[int]:
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.data.frame_choice import FrameChoice

    choice = None if num_chosen is None else FrameChoice("random", num_chosen, in_order=False)
    workers = 0 if cores == 1 else cores
    records = Records(case.files)
    for batch in records.training_batches(BATCH_SIZE, seed=0, choice=choice, workers=workers):
        yield len(batch.ids)


def joined(frames: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(frames), np.uint8).reshape(len(frames), -1)


def tfrecord_videos(case: Case) -> Iterator[list[np.ndarray]]:
    from tfrecord.reader import example_loader, sequence_loader

    keys = [key for key, _ in case.streams]
    context = {case.id_key: "byte", "labels": "int"}
    for file in cycle(case.files):
        if case.level == "frame":
            for _, lists in sequence_loader(file, None, context, dict.fromkeys(keys, "byte")):
                yield [joined(lists[key]) for key in keys]
        else:
            for features in example_loader(file, None, context | dict.fromkeys(keys, "float")):
                yield [features[key][None] for key in keys]


def protobuf_videos(case: Case) -> Iterator[list[np.ndarray]]:
    from ensemble_kit.data.protos import SequenceExample
    from ensemble_kit.data.tfrecord import read_records

    for file in cycle(case.files):
        for record in read_records(Path(file)):
            example = SequenceExample.FromString(record)
            context = {entry.key.decode(): entry.value for entry in example.context.feature}
            _ = context[case.id_key].bytes_list.value[0], list(context["labels"].int64_list.value)
            if case.level == "frame":
                lists = {
                    entry.key.decode(): entry.value for entry in example.feature_lists.feature_list
                }
                yield [
                    joined([feature.bytes_list.value[0] for feature in lists[key].feature])
                    for key, _ in case.streams
                ]
            else:
                floats = (context[key].float_list.value for key, _ in case.streams)
                yield [np.array(values, np.float32)[None] for values in floats]


def padded(
    videos: Callable[[Case], Iterator[list[np.ndarray]]], case: Case, _cores: int
) -> Iterator[int]:
    """Collate as the peers' users do: zeros, and each video copied into them."""
    source = videos(case)
    while True:
        chunk = list(islice(source, BATCH_SIZE))
        for stream in zip(*chunk, strict=True):
            longest = max(map(len, stream))
            batch = np.zeros((len(chunk), longest, stream[0].shape[1]), stream[0].dtype)
            for row, frames in zip(batch, stream, strict=True):
                row[: len(frames)] = frames
        yield len(chunk)


def read_tensorflow(case: Case, cores: int) -> Iterator[int]:
    """``TFRecordDataset``, one parse a record, ``padded_batch``: the fastest of three ways tried.

    In the order of the files: shuffling would copy the frames once more.
    """
    os.environ |= {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(cores)
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    context = {
        case.id_key: tf.io.FixedLenFeature([], tf.string),
        "labels": tf.io.VarLenFeature(tf.int64),
    }
    lists = {key: tf.io.FixedLenSequenceFeature([], tf.string) for key, _ in case.streams}
    floats = {key: tf.io.FixedLenFeature([width], tf.float32) for key, width in case.streams}

    def parse(record: Any) -> Any:
        if case.level == "frame":
            found, frames = tf.io.parse_single_sequence_example(record, context, lists)
            values = [tf.io.decode_raw(frames[key], tf.uint8) for key in lists]
        else:
            found = tf.io.parse_single_example(record, context | floats)
            values = [found[key][None] for key in floats]
        return found[case.id_key], tf.sparse.to_dense(found["labels"]), *values

    shapes = ([], [None], *([None, width] for _, width in case.streams))
    batches = (
        tf.data.TFRecordDataset(case.files)
        .repeat()
        .map(parse, num_parallel_calls=cores)
        .padded_batch(BATCH_SIZE, padded_shapes=shapes)
        .prefetch(2)
    )
    for ids, *_ in batches:
        yield len(ids)
