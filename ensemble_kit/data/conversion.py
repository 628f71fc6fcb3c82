"""A user's own features and labels to records in the challenge's format."""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import MAX_CLASSES, MAX_WIDTH, SPLIT, AnyPath, InputType, Level
from ensemble_kit.csv_lines import LABELS_HEADER, class_index, id_lines
from ensemble_kit.data.encode import HIGH, LOW, Encoder, dequantise, quantise, record_schema
from ensemble_kit.data.schema import (
    GRAPH_NAMES,
    LABEL_NAMES,
    MAX_FRAMES,
    MODALITY_NAME,
    Schema,
    read_label_names,
    write_label_names,
    write_schema,
)
from ensemble_kit.data.sources import READERS, joined_by_id, videos_of
from ensemble_kit.data.tfrecord import RecordWriter
from ensemble_kit.errors import RecordError, shown
from ensemble_kit.files import each_path, folder_written_aside
from ensemble_kit.progress import progress
from ensemble_kit.wording import counted

SHARD_BYTES = 64 << 20  # of a file of records; the next one is begun after that
FRAMES_APART = 2  # by which modalities of a video may differ: extractors round its end differently
IDS_NAMED = 5  # of those that are missing
SPLIT_NAME = r"[A-Za-z0-9_-]+"
LABELS_HINT = "Write class indices separated by spaces, or names separated by ; and --label-names."


class Quantisation(NamedTuple):
    """What quantising a modality changed, measured on all of its values as a reader gets them back.

    Attributes:
        rms: Root of the mean square of the differences.
        largest: The largest difference.
        clipped: The share of values outside -2 to 2, which become the nearest of these.
    """

    rms: float
    largest: float
    clipped: float


class Converted(NamedTuple):
    """What a conversion wrote.

    Attributes:
        folder: Where.
        schema: What the records hold.
        videos: How many videos each split has.
        num_cut: Of how many videos a modality was cut to the length of the shortest.
        quantisation: The error of each modality that was quantised.
    """

    folder: Path
    schema: Schema
    videos: dict[str, int]
    num_cut: int
    quantisation: dict[str, Quantisation]


def parse_split(text: str) -> dict[str, float]:
    """Read the shares of splits, such as ``train=0.8,validate=0.1,test=0.1``.

    Raises:
        RecordError: A share is no number above 0, a name occurs twice or cannot be a folder's, or
            the shares do not add up to 1.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        is_number = re.fullmatch(r"[0-9]*\.?[0-9]+", number, re.ASCII) and len(number) < 30
        is_good = is_number and re.fullmatch(SPLIT_NAME, name) and name not in shares
        share = float(number) if is_good else 0.0
        if not 0 < share <= 1:
            raise RecordError(
                f"{shown(part)} is no split: expected NAME=SHARE, and each name once.",
                hint=f"Write the splits as {SPLIT}.",
            )
        shares[name] = share
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise RecordError(
            f"The splits {text} add up to {sum(shares.values()):g}.",
            hint="Give shares that add up to 1.",
        )
    return shares


def split_of(video: str, shares: Mapping[str, float]) -> str:
    """Return the split of a video: a function of its id and the shares alone.

    The first eight bytes of the SHA-256 of the id, as a number in ``[0, 1)``, lie within one share.
    """
    digest = hashlib.sha256(video.encode(errors="surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return list(shares)[-1]


def convert(
    features: AnyPath | Sequence[AnyPath],
    labels: AnyPath,
    folder: AnyPath,
    *,
    label_names: AnyPath | None = None,
    split: Mapping[str, float] | None = None,
    quantised: bool = False,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Converted:
    """Write ``folder/<split>/<split>NNNN.tfrecord``, ``schema.toml`` and ``label_names.csv``.

    Videos are read one after the other; what memory holds grows with their ids and labels alone.
    The folder appears whole or not at all.

    Args:
        features: Files or folders of features, as ``data.sources`` reads them;
            ``NAME=PATH`` says what the modality of files of one array is called. Several names join
            their files by id.
        labels: A CSV file with the header ``VideoId,Labels``: class indices separated by spaces,
            or, where ``label_names`` is given, names separated by semicolons. May be gzipped.
        folder: The folder to make.
        label_names: The names of the classes, as ``read_label_names`` reads them; without it, there
            are as many classes as the largest index says.
        split: The share of each split; None takes those of ``SPLIT``.
        quantised: Whether floats become bytes as the challenge's did. Arrays of bytes stay bytes.
        shard_bytes: The size of a file of records after which the next one is begun.
        force: Whether records that the folder holds may be replaced.

    Returns:
        What was written.

    Raises:
        RecordError: A file cannot be read; a video has no labels, or labels no video; an id occurs
            twice; widths, types or levels differ; a value is not finite.
        OutputError: The folder holds something and ``force`` is False, or something that is not of
            a conversion; or the disk refuses a file.
    """
    labels, folder = Path(labels), Path(folder)
    names = None if label_names is None else read_label_names(label_names)
    classes_of, num_classes = _read_labels(labels, names)
    shares = dict(split or parse_split(SPLIT))
    with folder_written_aside(folder, force=force) as aside, ExitStack() as stack:
        writing = _Writing(aside, shares, stack, quantised=quantised, shard_bytes=shard_bytes)
        missing = dict.fromkeys(classes_of)
        with progress("converting", len(classes_of)) as bar:
            for number, (video, arrays) in enumerate(_videos(each_path(features)), start=1):
                if video not in classes_of:
                    raise RecordError(
                        f"Video {shown(video)} has features, but {labels} has no line for it.",
                        hint="Add its line to the labels, or leave its features out.",
                    )
                if video not in missing:
                    raise RecordError(
                        f"Video {shown(video)} occurs twice among the features.",
                        hint="Keep its features once, or give each video its own id.",
                    )
                del missing[video]
                writing.add(video, classes_of[video], arrays)
                bar.update(number)
        if missing:
            some = ", ".join(map(shown, list(missing)[:IDS_NAMED]))
            raise RecordError(
                f"{counted(len(missing), 'video')} of {labels} have no features: {some}"
                f"{', ...' if len(missing) > IDS_NAMED else ''}.",
                hint="Extract their features, or remove their lines.",
            )
        stack.close()
        schema = writing.schema(num_classes, names)
        file = LABEL_NAMES if names else None
        write_schema(schema, aside / "schema.toml", label_names_file=file, force=False)
        if names:
            write_label_names(aside / LABEL_NAMES, names, force=False)
    videos = {name: writing.counts[name] for name in shares}
    return Converted(folder, schema, videos, writing.num_cut, writing.quantisation())


def _read_labels(path: Path, names: Sequence[str] | None) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the classes of each id, and C."""
    index_of = {name: index for index, name in enumerate(names or ())}
    limit = len(names) if names else MAX_CLASSES
    classes_of = {}
    for where, video, text in id_lines(path, (LABELS_HEADER,), error_type=RecordError):
        tokens = [token.strip() for token in text.split(";") if token.strip()]
        if all(token in index_of for token in tokens):
            classes = [index_of[token] for token in tokens]
        else:
            indices = {token: class_index(token, limit) for token in text.split()}
            strangers = [token for token, index in indices.items() if index is None]
            if strangers:
                stranger = next((t for t in tokens if t not in index_of), strangers[0])
                is_name = ";" in text or names is not None
                raise RecordError(
                    f"{where}: {shown(stranger if is_name else strangers[0])} is no class, expected"
                    f" a number from 0 to {limit - 1}{' or a name of the classes' * bool(names)}.",
                    hint=LABELS_HINT,
                )
            classes = [index for index in indices.values() if index is not None]
        classes_of[video] = tuple(sorted(set(classes)))
    largest = max((classes[-1] for classes in classes_of.values() if classes), default=0)
    return classes_of, len(names) if names else largest + 1


def _videos(features: Sequence[str]) -> Iterator[tuple[str, Mapping[str, NDArray[Any]]]]:
    """Yield the videos of files, folders and ``NAME=`` of either."""
    named: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for each in features:
        name, equals, rest = each.partition("=")
        if equals and not os.path.exists(each):
            named.setdefault(_modality(name), []).extend(_expand(rest))
        else:
            unnamed += _expand(each)
    if named and unnamed:
        raise RecordError(
            f"{unnamed[0]} is given without a modality, but others are given with one.",
            hint="Write NAME=PATH for all of them, or for none.",
        )
    if len(named) > 1:
        return joined_by_id(named)
    files: list[tuple[Path, str | None]] = [(path, None) for path in unnamed]
    files += [(path, name) for name, paths in named.items() for path in paths]
    return chain.from_iterable(videos_of(path, name) for path, name in files)


def _modality(name: str) -> str:
    if not re.fullmatch(MODALITY_NAME, name) or name in GRAPH_NAMES:
        raise RecordError(
            f"{shown(name)} cannot name a modality.",
            hint=f"Use a-z, 0-9 and _, as in rgb, and none of {', '.join(sorted(GRAPH_NAMES))}.",
        )
    return name


def _expand(pattern: str) -> list[Path]:
    """Return a file, or the files of a folder that can be read, sorted."""
    path = Path(pattern)
    if os.path.isfile(path):
        return [path]
    ends = (*READERS, ".tfrecord.gz")
    found = sorted(each for each in path.glob("*") if each.name.lower().endswith(ends))
    if not found:
        what = "holds no files of features" if os.path.isdir(path) else "does not exist"
        raise RecordError(
            f"{path} {what}.", hint=f"Name files that end in {', '.join(READERS)}, or their folder."
        )
    return found


class _Writing:
    """The files of all splits, and what their records have in common so far.

    Args:
        folder: Where to write.
        shares: The share of each split.
        stack: Closes the files.
        quantised: Whether floats become bytes.
        shard_bytes: The size of a file after which the next one is begun.
    """

    def __init__(
        self,
        folder: Path,
        shares: Mapping[str, float],
        stack: ExitStack,
        *,
        quantised: bool,
        shard_bytes: int,
    ) -> None:
        self._shard_bytes = shard_bytes
        self._folder = folder
        self._shares = shares
        self._stack = stack
        self._quantised = quantised
        self._writers: dict[str, RecordWriter] = {}
        self._files: Counter[str] = Counter()
        self._first = ""
        self._level: Level = "frame"
        self._widths: dict[str, int] = {}
        self._types: dict[str, InputType] = {}
        self._encoder: Encoder | None = None
        self._longest = 0
        self._errors: dict[str, list[float]] = {}
        self.counts: Counter[str] = Counter()
        self.num_cut = 0

    def add(self, video: str, classes: Sequence[int], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a video to the file of its split."""
        frames = {
            _modality(name): self._checked(video, name, array) for name, array in arrays.items()
        }
        frames = self._same_length(video, frames)
        self._agrees(video, frames)
        if self._quantised:
            frames = {name: self._as_bytes(name, values) for name, values in frames.items()}
        if self._encoder is None:
            self._encoder = Encoder(self.schema(MAX_CLASSES, None))
        split = split_of(video, self._shares)
        self._writer(split).add(self._encoder.encode(video, classes, frames))
        self.counts[split] += 1

    def schema(self, num_classes: int, names: Sequence[str] | None) -> Schema:
        """Return the schema of what was written."""
        types = dict.fromkeys(self._widths, "uint8") if self._quantised else self._types
        return record_schema(
            self._widths,
            types,
            level=self._level,
            label_names=names,
            num_classes=num_classes,
            max_frames=max(MAX_FRAMES, self._longest),
        )

    def quantisation(self) -> dict[str, Quantisation]:
        """Return the error of each modality that was quantised."""
        return {
            name: Quantisation(math.sqrt(squares / count), largest, clipped / count)
            for name, (squares, largest, clipped, count) in self._errors.items()
        }

    def _checked(self, video: str, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return the frames of an array, ``(T, D)``, float32 or uint8."""
        where = f"Video {shown(video)}: {name}"
        if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or 0 in array.shape:
            raise RecordError(
                f"{where} is {array.dtype} of shape {array.shape}, expected numbers (frames, "
                "features), or (features,) for one vector.",
                hint="Save the features as an array of that shape, or leave the video out.",
            )
        if max(array.shape) > MAX_WIDTH:
            raise RecordError(
                f"{where} has the shape {array.shape}; at most {MAX_WIDTH:,} frames and features "
                "can be stored.",
                hint="Extract fewer frames a second, or leave the video out.",
            )
        if array.dtype == np.uint8:
            values = np.asarray(array)
        else:
            with np.errstate(over="ignore"):  # too large for float32 becomes infinite: refused
                values = np.asarray(array, np.float32)
            if not np.isfinite(values).all():
                frame, feature = np.argwhere(~np.isfinite(np.atleast_2d(values)))[0]
                raise RecordError(
                    f"{where} holds {np.atleast_2d(array)[frame, feature]} in frame {frame + 1}, "
                    f"feature {feature + 1}.",
                    hint="Extract its features again, or leave the video out.",
                )
        return values

    def _same_length(self, video: str, frames: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Cut modalities to the shortest one, where they differ by ``FRAMES_APART`` at most."""
        if len({values.ndim for values in frames.values()}) > 1:
            raise RecordError(
                f"Video {shown(video)} has frames of one modality and one vector of another.",
                hint="Give every modality frames, or every modality one vector.",
            )
        if next(iter(frames.values())).ndim == 1:
            return frames
        lengths = {name: len(values) for name, values in frames.items()}
        shortest, longest = min(lengths.values()), max(lengths.values())
        if longest - shortest > FRAMES_APART:
            counts = ", ".join(f"{count} of {name}" for name, count in lengths.items())
            raise RecordError(
                f"Video {shown(video)}: its modalities differ in frames: {counts}.",
                hint="Extract all modalities at the same number of frames a second.",
            )
        self.num_cut += longest > shortest
        return {name: values[:shortest] for name, values in frames.items()}

    def _agrees(self, video: str, frames: dict[str, NDArray[Any]]) -> None:
        """Hold a video against the first one, and make its frames ``(T, D)``."""
        level: Level = "video" if next(iter(frames.values())).ndim == 1 else "frame"
        widths = {name: values.shape[-1] for name, values in frames.items()}
        types: dict[str, InputType] = {
            name: "uint8" if values.dtype == np.uint8 else "float32"
            for name, values in frames.items()
        }
        if not self._first:
            self._first, self._level, self._widths, self._types = video, level, widths, types
        for what, ours, theirs in (
            ("level", level, self._level),
            ("modalities and widths", widths, self._widths),
            ("types", types, self._types),
        ):
            if ours != theirs:
                raise RecordError(
                    f"Video {shown(video)} differs in {what} from the first, "
                    f"{shown(self._first)}: {_said(ours)}, not {_said(theirs)}.",
                    hint="Extract the features of all videos in the same way.",
                )
        for name, values in frames.items():
            frames[name] = values.reshape(-1, values.shape[-1])
        self._longest = max(self._longest, len(next(iter(frames.values()))))

    def _as_bytes(self, name: str, values: NDArray[Any]) -> NDArray[np.uint8]:
        if values.dtype == np.uint8:
            return values
        quantised = quantise(values)
        differences = np.abs(dequantise(quantised).astype(np.float64) - values)
        sums = self._errors.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        sums[0] += float(np.square(differences).sum())
        sums[1] = max(sums[1], float(differences.max()))
        sums[2] += int(((values < LOW) | (values > HIGH)).sum())
        sums[3] += values.size
        return quantised

    def _writer(self, split: str) -> RecordWriter:
        writer = self._writers.get(split)
        if writer is None or writer.num_bytes >= self._shard_bytes:
            if writer is not None:
                writer.close()
            path = self._folder / split / f"{split}{self._files[split]:04d}.tfrecord"
            path.parent.mkdir(exist_ok=True)
            writer = self._writers[split] = RecordWriter(path)
            self._stack.callback(writer.close)
            self._files[split] += 1
        return writer


def _said(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {each}" for name, each in value.items())
