"""Files of features, as other tools leave them, to videos: one after the other, never all at once.

Two kinds of files are known by their suffix and, where it may be either, by what they hold:

- of one video, whose id is the file's name: ``.npy``; ``.npz`` with an array for each modality;
  ``.pb``, the ``SequenceExample`` that MediaPipe writes;
- of many videos: ``.npz``, ``.h5`` and ``.parquet`` with their ids in one of ``ID_NAMES`` and an
  array or a column for each modality; ``.h5`` with a group for each video; ``.tfrecord``, of any
  kind that the kit reads or of MediaPipe's examples.

An array is ``(T, D)`` for a video of T frames, ``(D,)`` for one of a single vector.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ensemble_kit.choices import CACHE_BYTES
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.fields import split
from ensemble_kit.data.protos import Feature, FeatureList
from ensemble_kit.data.remote import default_cache, expanded_place
from ensemble_kit.data.tfrecord import is_gzipped_records, numbered_records
from ensemble_kit.errors import RecordError, shown

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Videos: TypeAlias = Iterator[tuple[str, Arrays]]

ID_NAMES = ("id", "ids", "video_id", "VideoId")
UNNAMED = "features"  # the modality of an array that nobody named
COUNTS = "num_frames"  # of each video, where arrays of many videos are padded
FLOATS = b"/feature/floats"  # the end of MediaPipe's keys, as RGB/feature/floats
MEDIAPIPE_IDS = (b"example/id", b"clip/media_id")
MAX_FILE_BYTES = 2**31  # of a file that is read whole: one video's
NAME_THEM = f"Give it the videos' ids as {' or '.join(ID_NAMES[:2])}, one for each row."


def videos_of(path: Path, modality: str | None = None) -> Videos:
    """Yield id and arrays of each video of a file, in the order of the file.

    Args:
        path: A file of features.
        modality: What the modality of a file of one array is called; None takes the file's own
            name for it, and ``features`` where it has none.

    Raises:
        RecordError: The file cannot be read, is of no known kind, or needs a package that is not
            installed.
    """
    suffix = ".tfrecord" if path.name.endswith(".tfrecord.gz") else path.suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        raise RecordError(
            f"{path} is no file of features that can be read.",
            hint=f"Name files that end in one of {', '.join(READERS)}.",
        )
    try:
        for video, arrays in reader(path):
            if modality is not None and len(arrays) != 1:
                raise RecordError(
                    f"{path} has {len(arrays)} modalities ({', '.join(arrays)}), and {modality}= "
                    "names one.",
                    hint="Name the file without a modality; it names its own.",
                )
            yield video, arrays if modality is None else {modality: next(iter(arrays.values()))}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise RecordError(
            f"{path} cannot be read: {reason}.", hint="Make the file again, or leave it out."
        ) from error


def _npy(path: Path) -> Videos:
    yield path.stem, {UNNAMED: np.load(path, mmap_mode="r", allow_pickle=False)}


def _npz(path: Path) -> Videos:
    """Read a video's arrays, or the rows of many videos' without loading them all."""
    with zipfile.ZipFile(path) as archive, ExitStack() as stack:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        files = {name: stack.enter_context(archive.open(f"{name}.npy")) for name in names}
        ids = next((name for name in ID_NAMES if name in names), None)
        if ids is None:
            if sum(info.file_size for info in archive.infolist()) > MAX_FILE_BYTES:
                raise ValueError(f"it has no ids and holds more than {MAX_FILE_BYTES:,} bytes")
            yield path.stem, {name: np.array([*_rows(file)]) for name, file in files.items()}
            return
        columns = {name: _rows(file) for name, file in files.items()}
        yield from _table(path, columns.pop(ids), columns)


def _rows(file: IO[bytes]) -> Iterator[NDArray[Any]]:
    """Yield the rows of an array of NumPy's format as they are read."""
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if is_fortran and len(shape) > 1:
        raise ValueError("its array is in Fortran's order; save numpy.ascontiguousarray(it)")
    if not shape:
        raise ValueError("it holds a single number where an array is expected")
    size = int(np.prod(shape[1:])) * dtype.itemsize
    if size > MAX_FILE_BYTES:
        raise ValueError(f"a row of its array has more than {MAX_FILE_BYTES:,} bytes")
    for _ in range(shape[0]):
        content = file.read(size)
        if len(content) < size:
            raise EOFError("its array ends early")
        yield np.frombuffer(content, dtype).reshape(shape[1:])


def _table(path: Path, ids: Iterable[Any], columns: Mapping[str, Iterator[NDArray[Any]]]) -> Videos:
    """Yield the rows of arrays of many videos side by side, padding cut off."""
    counts = columns.get(COUNTS)
    names = [name for name in columns if name != COUNTS]
    if not names:
        raise RecordError(
            f"{path} holds ids, but no features.", hint="Add an array for each modality."
        )
    for number, identity in enumerate(ids, start=1):
        try:
            arrays = {name: next(columns[name]) for name in names}
            if counts is not None:
                count = int(next(counts))
                arrays = {name: array[:count] for name, array in arrays.items()}
        except StopIteration:
            raise RecordError(
                f"{path} has more ids than rows of features: row {number} is missing.",
                hint=NAME_THEM,
            ) from None
        yield _text(identity), arrays
    for name in names:
        if next(columns[name], None) is not None:
            raise RecordError(f"{path} has more rows of {name} than ids.", hint=NAME_THEM)


def _hdf5(path: Path) -> Videos:
    h5py = _package("h5py", "hdf5", path)
    with h5py.File(path) as file:
        ids = next((name for name in ID_NAMES if name in file), None)
        if ids is not None:
            names = [name for name in file if name != ids]
            yield from _table(path, file[ids], {name: iter(file[name]) for name in names})
            return
        for video, held in file.items():
            if isinstance(held, h5py.Group):
                yield video, {name: np.asarray(held[name]) for name in held}
            else:
                yield video, {UNNAMED: np.asarray(held)}


def _parquet(path: Path) -> Videos:
    parquet = _package("pyarrow.parquet", "parquet", path)
    # pre_buffer would hold what is read ahead of all row groups
    with parquet.ParquetFile(path, pre_buffer=False) as file:
        names = file.schema_arrow.names
        ids = next((name for name in ID_NAMES if name in names), None)
        if ids is None:
            raise RecordError(f"{path} has no column of ids ({', '.join(names)}).", hint=NAME_THEM)
        for batch in file.iter_batches(batch_size=16, use_threads=False):
            columns = dict(zip(names, batch.columns, strict=True))
            for number, identity in enumerate(columns.pop(ids).to_pylist()):
                video = _text(identity)
                yield (
                    video,
                    {
                        name: _list(path, video, name, column[number])
                        for name, column in columns.items()
                    },
                )


def _list(path: Path, video: str, name: str, value: Any) -> NDArray[Any]:
    """Return a list of numbers, or of lists of numbers, as an array; a missing number is NaN."""
    numbers: Any = getattr(value, "values", None)
    lengths = {None}
    if hasattr(numbers, "value_lengths"):
        lengths, count = set(numbers.value_lengths().to_pylist()), len(numbers)
        numbers = numbers.flatten()
    if numbers is None or len(lengths) > 1 or hasattr(numbers, "value_lengths"):
        raise RecordError(
            f"{path}, video {shown(video)}: {name} is no list of numbers, nor one of frames of the "
            "same width.",
            hint="Give each modality a column of lists, and leave other columns out.",
        )
    array: NDArray[Any] = numbers.to_numpy(zero_copy_only=False)
    return array if lengths == {None} else array.reshape(count, -1)


def _mediapipe(path: Path) -> Videos:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes")
    arrays = _floats(path.read_bytes())
    if not arrays:
        raise RecordError(
            f"{path} has no list of features such as RGB/feature/floats.",
            hint="Name the SequenceExample files that MediaPipe writes.",
        )
    yield path.stem, arrays


def _floats(record: bytes | memoryview) -> dict[str, NDArray[Any]]:
    """Return MediaPipe's arrays of an example: ``RGB/feature/floats`` as ``rgb``."""
    arrays = {}
    for key, parts in sorted(split(record)[1].items(), reverse=True):  # RGB comes before AUDIO
        if key.endswith(FLOATS):
            features = FeatureList.FromString(b"".join(parts)).feature
            rows = [np.array(feature.float_list.value, np.float32) for feature in features]
            if len({len(row) for row in rows}) > 1:
                raise ValueError(f"frames of {key.decode(errors='replace')} differ in width")
            name = key.removesuffix(FLOATS).decode(errors="replace").lower().replace("/", "_")
            arrays[name] = np.array(rows)
    return arrays


def _tfrecord(path: Path) -> Videos:
    """Read MediaPipe's examples where the first record is one, else records of a known kind."""
    place = path
    if is_gzipped_records(path):
        place = expanded_place(path.absolute(), cache=default_cache(), cache_bytes=CACHE_BYTES)
    for number, record in numbered_records(place):
        if not _floats(record):
            break
        context = split(record)[0]
        key = next((key for key in MEDIAPIPE_IDS if key in context), None)
        if key is None:
            raise RecordError(
                f"{path}, record {number}: it has no id (example/id or clip/media_id).",
                hint="Convert the .pb files themselves: their names are the ids.",
            )
        (identity,) = Feature.FromString(b"".join(context[key])).bytes_list.value
        yield _text(identity), _floats(record)
    else:
        return
    records = Records([path], needs_labels=False)
    is_frame = records.schema.level == "frame"
    for video in records.videos():
        yield video.id, video.frames if is_frame else {n: a[0] for n, a in video.frames.items()}


def _text(identity: Any) -> str:
    value = identity.item() if hasattr(identity, "item") else identity
    return value.decode() if isinstance(value, bytes) else str(value)


def _package(name: str, extra: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecordError(
            f"{path} needs a package that is not installed: {name.partition('.')[0]}.",
            hint=f"Install it: pip install 'ensemble-kit[{extra}]'.",
        ) from error


READERS: Mapping[str, Callable[[Path], Videos]] = MappingProxyType(
    {
        ".npy": _npy,
        ".npz": _npz,
        ".h5": _hdf5,
        ".hdf5": _hdf5,
        ".parquet": _parquet,
        ".pb": _mediapipe,
        ".tfrecord": _tfrecord,
    }
)


def joined_by_id(sources: Mapping[str, Sequence[Path]]) -> Videos:
    """Yield the videos whose modalities lie in different files, one array a file, by their ids.

    Args:
        sources: The files of one video each (``.npy``) of each modality.

    Raises:
        RecordError: A video lacks a modality, or two files of a modality have the same name.
    """
    paths: dict[str, dict[str, Path]] = {}
    for modality, files in sources.items():
        by_id = paths.setdefault(modality, {})
        for path in files:
            if path.suffix.lower() != ".npy":
                raise RecordError(
                    f"{path} cannot be joined with other files: {modality}= names .npy files of "
                    "one video each.",
                    hint="Write all modalities of many videos into one .npz, .h5 or .parquet file.",
                )
            if by_id.setdefault(path.stem, path) != path:
                raise RecordError(
                    f"Video {shown(path.stem)} occurs twice: in {by_id[path.stem]} and in {path}.",
                    hint="Keep one file for each video and modality.",
                )
    everyone = dict.fromkeys(video for by_id in paths.values() for video in by_id)
    for video in everyone:
        for modality, by_id in paths.items():
            if video not in by_id:
                other = next(each[video] for each in paths.values() if video in each)
                raise RecordError(
                    f"Video {shown(video)} has no {modality}, but {other}.",
                    hint=f"Extract its {modality}, or leave the video out.",
                )
        arrays: dict[str, NDArray[Any]] = {}
        for modality, by_id in paths.items():
            for _, one in videos_of(by_id[video], modality):
                arrays |= one
        yield video, arrays
