"""Records in the challenge's format with structure to learn.

Every frame shows one of a few backgrounds and noise. On top of it each class of a video shows its
prototype, in one of three ways that suit different sub-models:

- ``steady`` (classes 0, 3, 6, …): weakly, in all frames, so that an average finds it;
- ``burst`` (classes 1, 4, 7, …): strongly, in an eighth of the frames, in one run, where pooling
  that distinguishes frames does better;
- ``order`` (classes 2, 5, 8, …): two bursts, one after the other. Two such classes share their two
  prototypes and differ in which comes first, which only a recurrent sub-model can distinguish.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from os.path import exists
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import (
    LEVEL,
    SEED,
    SYNTHETIC_CLASSES,
    SYNTHETIC_FRAMES,
    SYNTHETIC_LABEL_SKEW,
    SYNTHETIC_SHARDS,
    SYNTHETIC_VIDEOS,
    SYNTHETIC_WIDTHS,
    AnyPath,
    Level,
)
from ensemble_kit.data.encode import HIGH, LOW, Encoder, quantise, record_schema
from ensemble_kit.data.schema import LABEL_NAMES, Schema, write_label_names, write_schema
from ensemble_kit.data.tfrecord import write_records
from ensemble_kit.files import refuse_overwrite, written_aside

UNFINISHED = ".unfinished"  # in the folder until all is written
SIGNS = ("steady", "burst", "order")
LABELS_BEYOND_FIRST = 2.0  # mean of a Poisson law: 3 labels a video, as YouTube-8M has
NUM_BACKGROUNDS = 16
BACKGROUND, NOISE, STEADY, BURST = 0.4, 0.4, 0.05, 0.5  # standard deviations of one feature
BURST_SHARE = 8  # a burst lasts an eighth of the frames


def synthesize(
    folder: AnyPath,
    *,
    num_videos: Mapping[str, int] = SYNTHETIC_VIDEOS,
    modalities: Mapping[str, int] = SYNTHETIC_WIDTHS,
    num_classes: int = SYNTHETIC_CLASSES,
    label_skew: float = SYNTHETIC_LABEL_SKEW,
    frames: tuple[int, int] = SYNTHETIC_FRAMES,
    level: Level = LEVEL,
    num_shards: int = SYNTHETIC_SHARDS,
    seed: int = SEED,
    force: bool = False,
) -> Schema:
    """Write ``folder/<split>/<split>NNNN.tfrecord``, ``schema.toml`` and ``label_names.csv``.

    A call that was stopped can be made again without ``force``.

    The same arguments give the same bytes, with the same release of NumPy. A video depends on its
    split and number only, not on the number of videos or shards.

    Args:
        folder: Where to write; made if need be.
        num_videos: How many videos each split has, by the split's name.
        modalities: Name and width of each modality; the challenge has rgb 1024 and audio 128.
        num_classes: C.
        label_skew: Class c is drawn in proportion to ``(c + 1) ** -label_skew``; 0 is uniform.
        frames: The fewest and the most frames of a video, drawn evenly.
        level: ``frame`` for quantised frames, ``video`` for their means as floats, which
            hide the order.
        num_shards: Files a split; fewer where there are fewer videos.
        seed: Whatever is drawn follows from it.
        force: Whether records that a split's folder holds may be replaced.

    Returns:
        The schema of the records.

    Raises:
        OutputError: A split's folder holds records, or another file exists, and ``force`` is
            False; or the disk refuses a file.
    """
    folder = Path(folder)
    unfinished = folder / UNFINISHED
    force = force or exists(unfinished)  # what a killed call has left is of no use to anybody
    refuse_overwrite(folder / "schema.toml", force=force)
    for split in num_videos:
        for stale in sorted((folder / split).glob("*.tfrecord")):
            refuse_overwrite(stale, force=force)
            stale.unlink()  # one left of a run with more shards would be read with the new ones
    with written_aside(unfinished, force=True) as aside:
        aside.touch()
    names = tuple(f"{SIGNS[index % 3]} {index}" for index in range(num_classes))
    types = dict.fromkeys(modalities, "uint8" if level == "frame" else "float32")
    schema = record_schema(
        modalities, types, level=level, label_names=names, num_classes=num_classes
    )
    world = World.draw(modalities, num_classes, label_skew, seed)
    for split, count in num_videos.items():
        bounds = np.linspace(0, count, min(num_shards, count) + 1, dtype=int).tolist()
        for shard, (start, stop) in enumerate(pairwise(bounds)):
            records = _records(world, split, range(start, stop), frames, schema, seed)
            write_records(folder / split / f"{split}{shard:04d}.tfrecord", records, force=force)
    write_label_names(folder / LABEL_NAMES, names, force=force)
    write_schema(schema, folder / "schema.toml", label_names_file=LABEL_NAMES, force=force)
    unfinished.unlink(missing_ok=True)
    return schema


@dataclass(frozen=True)
class World:
    """What all videos of a seed share.

    Attributes:
        widths: The width of each modality; D is their sum.
        log_frequencies: ``(C,)``; how often a class is drawn, up to a constant.
        backgrounds: ``(NUM_BACKGROUNDS, D)``.
        prototypes: ``(C, 2, D)``; what a class shows first and second. Only ``order`` classes show
            the second.
    """

    widths: Mapping[str, int]
    log_frequencies: NDArray[np.float64]
    backgrounds: NDArray[np.float32]
    prototypes: NDArray[np.float32]

    @classmethod
    def draw(
        cls, widths: Mapping[str, int], num_classes: int, label_skew: float, seed: int
    ) -> "World":
        """Draw a world from a seed."""
        random = np.random.default_rng((seed, 0))
        width = sum(widths.values())
        backgrounds = random.standard_normal((NUM_BACKGROUNDS, width), np.float32)
        prototypes = random.standard_normal((num_classes, 2, width), np.float32)
        for index in range(5, num_classes, 6):  # 2 and 5, 8 and 11, … are opposites
            prototypes[index] = prototypes[index - 3, ::-1]
        log_frequencies = -label_skew * np.log(np.arange(1, num_classes + 1))
        return cls(widths, log_frequencies, backgrounds, prototypes)

    def labels(self, random: np.random.Generator) -> list[int]:
        """Draw the classes of a video, sorted, without replacement (the Gumbel top-k draw)."""
        count = min(1 + int(random.poisson(LABELS_BEYOND_FIRST)), len(self.log_frequencies))
        keys = self.log_frequencies + random.gumbel(size=len(self.log_frequencies))
        return sorted(np.argsort(-keys)[:count].tolist())

    def video(
        self, classes: list[int], num_frames: int, random: np.random.Generator
    ) -> NDArray[np.float32]:
        """Draw the frames of a video, ``(T, D)``, not yet clipped."""
        shape = num_frames, self.backgrounds.shape[1]
        values = NOISE * random.standard_normal(shape, np.float32)
        values += BACKGROUND * self.backgrounds[random.integers(NUM_BACKGROUNDS, size=num_frames)]
        length = max(1, num_frames // BURST_SHARE)
        for index in classes:
            first, second = self.prototypes[index]
            if SIGNS[index % 3] == "steady":
                values += STEADY * first
                continue
            num_bursts = 2 if SIGNS[index % 3] == "order" else 1
            start = int(random.integers(max(1, num_frames - num_bursts * length + 1)))
            values[start : start + length] += BURST * first
            if num_bursts == 2:
                values[start + length : start + 2 * length] += BURST * second
        return values


def _records(
    world: World,
    split: str,
    numbers: range,
    frames: tuple[int, int],
    schema: Schema,
    seed: int,
) -> Iterator[bytes]:
    encoder = Encoder(schema)
    for number in numbers:
        random = np.random.default_rng((seed, 1, zlib.crc32(split.encode()), number))
        classes = world.labels(random)
        num_frames = int(random.integers(frames[0], frames[1] + 1))
        values = world.video(classes, num_frames, random)
        ends = np.cumsum(list(world.widths.values())).tolist()
        shown = {}
        for (name, width), end in zip(world.widths.items(), ends, strict=True):
            part = values[:, end - width : end]
            if schema.level == "video":
                shown[name] = np.clip(part, LOW, HIGH).mean(axis=0, keepdims=True)
            else:
                shown[name] = quantise(part)
        yield encoder.encode(f"{split}{number:06d}", classes, shown)
