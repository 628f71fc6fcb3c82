"""Videos and bytes a second from records to arrays, beside the peers that read them.

    python benchmarks/read_records.py [DATA] [--quick] [--json] [--tensorflow PYTHON]

Records of 300 frames of 1,024 and 128 bytes are made for it; with DATA, the folder that the
examples take, AudioSet's frames and YouTube-8M's video level are read too. Everybody reads from the
page cache, in a process of its own, on as many cores as the table says. The kit and tf.data compare
both checksums, protobuf by hand too; ``tfrecord`` compares none. ``--tensorflow`` names another
Python that has TensorFlow, where this one has not.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from common import (
    Figures,
    alone,
    copy_bandwidth,
    in_turn,
    machine,
    parser_of,
    peak_bytes,
    print_json,
    print_table,
    ratio,
    spread,
    versions,
)

BATCH_SIZE = 128
WARM_BATCHES = 8  # not timed: processes start, graphs are traced, memory is touched
MIB = 1 << 20


class Case(NamedTuple):
    """Some records.

    ``streams`` has name, key, width and value type of each modality; ``passes`` is how often the
    records are read in one timing.
    """

    title: str
    files: list[str]
    level: str
    id_key: str
    streams: list[tuple[str, str, int, str]]
    num_videos: int
    passes: int

    @property
    def num_bytes(self) -> int:
        return sum(os.path.getsize(file) for file in self.files)


def case_of(title: str, folder: Path, *, passes: int) -> Case:
    from ensemble_kit.data.dataset import Records

    records = Records([folder])
    schema = records.schema
    return Case(
        title,
        [str(path) for path in records.paths],
        schema.level,
        schema.id_key,
        [(m.name, m.key, m.width, m.value_type) for m in schema.modalities],
        records.count(),
        passes,
    )


# --- the readers: each yields how many videos it has just made arrays of


def read_ours(case: Case, workers: int) -> Iterator[int]:
    from ensemble_kit.data.dataset import Records

    records = Records(case.files)
    batches = records.training_batches(BATCH_SIZE, seed=0, epochs=case.passes, workers=workers)
    for batch in batches:
        yield len(batch.ids)


def padded(videos: Iterable[dict[str, np.ndarray]]) -> Iterator[int]:
    """Collate as the peers' users do: zeros, and each video copied into them."""
    videos = iter(videos)
    while chunk := list(islice(videos, BATCH_SIZE)):
        for name in chunk[0]:
            longest = max(len(video[name]) for video in chunk)
            shape = len(chunk), longest, chunk[0][name].shape[1]
            batch = np.zeros(shape, chunk[0][name].dtype)
            for row, video in zip(batch, chunk, strict=True):
                row[: len(video[name])] = video[name]
        yield len(chunk)


def tfrecord_videos(case: Case) -> Iterator[dict[str, np.ndarray]]:
    from tfrecord.reader import example_loader, sequence_loader

    context = {case.id_key: "byte", "labels": "int"}
    if case.level == "frame":
        lists = {key: "byte" for _, key, _, _ in case.streams}
        for file in case.files * case.passes:
            for _, features in sequence_loader(file, None, context, lists):
                yield {key: np.stack(features[key]) for key in lists}
        return
    floats = {key: "float" for _, key, _, _ in case.streams}
    for file in case.files * case.passes:
        for features in example_loader(file, None, context | floats):
            yield {key: features[key][None] for key in floats}


def protobuf_videos(case: Case) -> Iterator[dict[str, np.ndarray]]:
    from ensemble_kit.data.protos import SequenceExample
    from ensemble_kit.data.tfrecord import read_records

    for file in case.files * case.passes:
        for record in read_records(Path(file)):
            example = SequenceExample.FromString(record)
            context = {entry.key.decode(): entry.value for entry in example.context.feature}
            _ = context[case.id_key].bytes_list.value[0], list(context["labels"].int64_list.value)
            if case.level == "video":
                yield {
                    key: np.array(context[key].float_list.value, np.float32)[None]
                    for _, key, _, _ in case.streams
                }
                continue
            lists = {entry.key.decode(): entry.value for entry in example.feature_lists.feature}
            video = {}
            for _, key, width, _ in case.streams:
                joined = b"".join(f.bytes_list.value[0] for f in lists[key].feature)
                video[key] = np.frombuffer(joined, np.uint8).reshape(-1, width)
            yield video


def read_tensorflow(case: Case, cores: int) -> Iterator[int]:
    """``TFRecordDataset``, one parse a record, ``padded_batch``: the fastest of three ways tried.

    In the order of the files: shuffling would copy the frames once more.
    """
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(cores)
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    context = {
        case.id_key: tf.io.FixedLenFeature([], tf.string),
        "labels": tf.io.VarLenFeature(tf.int64),
    }
    is_frame = case.level == "frame"
    widths = {key: width for _, key, width, _ in case.streams}

    def parse(record: Any) -> Any:
        if is_frame:
            lists = {key: tf.io.FixedLenSequenceFeature([], tf.string) for key in widths}
            found, frames = tf.io.parse_single_sequence_example(record, context, lists)
            frames = [tf.io.decode_raw(frames[key], tf.uint8) for key in widths]
        else:
            floats = {k: tf.io.FixedLenFeature([w], tf.float32) for k, w in widths.items()}
            found = tf.io.parse_single_example(record, context | floats)
            frames = [found[key][None] for key in widths]
        return found[case.id_key], tf.sparse.to_dense(found["labels"]), *frames

    shapes = ([], [None], *([None, width] for width in widths.values()))
    batches = (
        tf.data.TFRecordDataset(case.files * case.passes)
        .map(parse, num_parallel_calls=cores)
        .padded_batch(BATCH_SIZE, padded_shapes=shapes)
        .prefetch(2)
    )
    for ids, *_ in batches:
        yield len(ids)


# --- timing


def timed(batches: Iterator[int], case: Case, *, cores: int) -> Figures:
    """Time the batches behind the first ones, on some cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    for _ in islice(batches, WARM_BATCHES):
        pass
    start = time.perf_counter()
    num_videos = sum(islice(batches, None))
    seconds = time.perf_counter() - start
    videos = num_videos / seconds
    return {"videos_per_second": videos, "bytes_per_second": videos * case.num_bytes / case.num_videos}


def time_ours(case: Case, cores: int) -> Figures:
    workers = 0 if cores == 1 else cores
    batches = read_ours(case, workers)
    figures = timed(batches, case, cores=cores)
    return figures


def time_videos(
    videos: Callable[[Case], Iterator[dict[str, np.ndarray]]], case: Case, cores: int
) -> Figures:
    return timed(padded(videos(case)), case, cores=cores)


def time_tensorflow(case: Case, cores: int) -> Figures:
    return timed(read_tensorflow(case, cores), case, cores=cores)
