"""Tags with times: a model's best classes for each window of some seconds of a video."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import (
    BATCH_SIZE,
    DEVICE,
    SEGMENT_SECONDS,
    SEGMENTS_PER_CLASS,
    TOP_K,
    AnyPath,
    Dtype,
)
from ensemble_kit.data.batch import collate
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.decode import Video
from ensemble_kit.data.schema import Schema, check_fits
from ensemble_kit.data.segments import rated_segments
from ensemble_kit.errors import OutputError, RecordError
from ensemble_kit.files import refuse_overwrite, require_suffix, written_aside
from ensemble_kit.inference import load_for, load_in
from ensemble_kit.metrics import top_classes
from ensemble_kit.predictions.challenge_csv import format_pairs
from ensemble_kit.predictions.rows import Floats, as_probabilities
from ensemble_kit.predictions.segment_csv import TopSegments, read_classes, write_submission
from ensemble_kit.predictions.writing import predictions_written
from ensemble_kit.progress import progress
from ensemble_kit.serving.windows import Window, windows

CSV_HEADER = ("VideoId", "start", "end", "labels")


class Tagged(NamedTuple):
    """The best classes of one window.

    Attributes:
        video: The video's id.
        start: Its first moment, in seconds.
        end: Its last, in seconds.
        classes: ``(k,)``, the best first.
        confidences: ``(k,)``, their probabilities.
    """

    video: str
    start: float
    end: float
    classes: NDArray[np.int64]
    confidences: NDArray[np.floating[Any]]


def predict_windows(
    model: AnyPath,
    records: Records,
    output: AnyPath,
    *,
    window: float,
    stride: float | None = None,
    repeats: int | None = None,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
    dtype: Dtype | None = None,
    device: str = DEVICE,
    force: bool = False,
) -> Path:
    """Write the best classes of each window of each video.

    Each window is run as if it were a video, so its probabilities are those of ``predict`` on a
    record of its frames.

    Args:
        model: A checkpoint, a foreign model, a fused file or an ONNX file.
        records: The videos, in the files' order. They need no labels.
        output: A ``.csv`` file with the columns ``VideoId``, ``start``, ``end`` (seconds) and
            ``labels``, in which classes and probabilities alternate, the best first; or a
            ``.jsonl`` file with an object a line, which has the classes' names too.
        window: The length of a window, in seconds; the schema says how many frames are a second.
        stride: From the start of one window to the next, in seconds; None takes ``window``.
        repeats: See ``predict``.
        batch_size: Windows at a time; it changes memory and speed only.
        top_k: How many classes of each window to write; None writes 20.
        dtype: See ``predict``.
        device: ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        PredictionsError: The records do not have the model's modalities or vocabulary.
        RecordError: The records are of level ``video``, so they have no times; or the window or the
            stride is less than a frame of theirs.
    """
    model, output = Path(model), Path(output)
    write = _writer(output)
    refuse_overwrite(output, force=force)
    strides = window if stride is None else stride
    run = _WindowRun(model, records, window, strides, repeats, dtype, device)

    def tagged(shown: Callable[[int, str], None]) -> Iterator[Tagged]:
        for video, start, end, row in run.rows(batch_size, shown):
            classes, confidences = top_classes(row[None], top_k or TOP_K)
            yield Tagged(video, start, end, classes[0], confidences[0])

    with (
        written_aside(output, force=force) as aside,
        aside.open("w", encoding="utf-8", newline="") as file,
        progress(f"predict {run.loaded.name}", 0) as shown,
    ):
        write(file, tagged(shown.update), run.loaded.schema.names)
    return output


def predict_segments(
    model: AnyPath,
    records: Records,
    output: AnyPath,
    *,
    classes_path: AnyPath | None = None,
    k: int = SEGMENTS_PER_CLASS,
    repeats: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: Dtype | None = None,
    device: str = DEVICE,
    force: bool = False,
) -> Path:
    """Write a submission of the YouTube-8M challenge of 2019: the best segments of each class.

    A segment is a window of 5 seconds, run as if it were a video; see ``predict_windows``.

    Args:
        model: A checkpoint, a foreign model, a fused file or an ONNX file.
        records: The videos. They need no labels.
        output: A ``.csv`` file with the columns ``Class`` and ``Segments``, the latter as
            ``VIDEO:START``, in seconds, the likeliest first.
        classes_path: A file that lists the classes to submit, one a line; None submits all.
        k: How many segments of each class to list; the challenge counts 100,000.
        repeats: See ``predict``.
        batch_size: Segments at a time; it changes memory and speed only.
        dtype: See ``predict``.
        device: ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        PredictionsError: The records do not have the model's modalities or vocabulary, or
            ``classes_path`` is no list of its classes.
        RecordError: As ``predict_windows``.
    """
    output = Path(output)
    require_suffix(output, ".csv")
    refuse_overwrite(output, force=force)
    run = _WindowRun(Path(model), records, SEGMENT_SECONDS, SEGMENT_SECONDS, repeats, dtype, device)
    num_classes = run.loaded.schema.num_classes
    classes: Sequence[int] = range(num_classes)
    if classes_path is not None:
        classes = read_classes(Path(classes_path), num_classes)
    segments = TopSegments(num_classes, k=k)
    with progress(f"predict {run.loaded.name}", 0) as shown:
        for video, start, _, row in run.rows(batch_size, shown.update):
            segments.add(video, round(start), row)
    write_submission(output, segments, classes, force=force)
    return output


def predict_rated_segments(
    model: AnyPath,
    records: Records,
    output: AnyPath,
    *,
    repeats: int | None = None,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
    dtype: Dtype | None = None,
    device: str = DEVICE,
    force: bool = False,
) -> Path:
    """Write the probabilities of the segments that people have rated, for ``select``.

    Each is run as if it were a video, and named ``VIDEO:START``; its labels are the classes that
    it is known to show. Everything else is as in ``predict``, which says what the arguments are.

    Args:
        model: See ``predict``.
        records: Records of frames with ratings, see ``data.segments``.
        output: A ``.safetensors`` file.
        repeats: See ``predict``.
        batch_size: Segments at a time; it changes memory and speed only.
        top_k: See ``predict``.
        dtype: See ``predict``.
        device: ``cpu`` or ``cuda``.
        force: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        PredictionsError: The records do not have the model's modalities or vocabulary.
        RecordError: The records have no ratings, or no frames.
    """
    output = Path(output)
    require_suffix(output, ".safetensors")
    refuse_overwrite(output, force=force)
    _refuse_level(records)
    loaded, described = load_for(
        records, Path(model), output.parent, dtype=dtype, repeats=repeats, device=device
    )
    with (
        predictions_written(
            output,
            label_names=loaded.schema.names,
            name=loaded.name,
            model=described,
            top_k=top_k,
            force=force,
        ) as writer,
        progress(f"predict {loaded.name}", 0) as shown,
    ):
        segments = _counted(rated_segments(records), shown.update, "segments")
        while chunk := list(islice(segments, batch_size)):
            batch = collate(chunk, records.schema)
            writer.add(batch.ids, batch.labels, loaded.probabilities(batch))
    return output


def _refuse_level(records: Records) -> None:
    if records.schema.level != "frame":
        raise RecordError(
            f"{records.paths[0]} has one vector for each video, so its windows cannot be told "
            "apart.",
            hint="Name records of frames.",
        )


class _WindowRun:
    """A model that is run on the windows of some records, as if each were a video."""

    def __init__(
        self,
        model: Path,
        records: Records,
        window: float,
        stride: float,
        repeats: int | None,
        dtype: Dtype | None,
        device: str,
    ) -> None:
        self._model, self._records = model, records
        schema = records.schema
        _refuse_level(records)
        self._cut = _cutter(schema, window, stride)
        self.loaded = load_in(dtype, model, repeats=repeats, device=device)
        check_fits(self.loaded.schema, schema, path=model)

    def rows(
        self, batch_size: int, shown: Callable[[int, str], None]
    ) -> Iterator[tuple[str, float, float, Floats]]:
        """Yield each window: the video, its first and last moment in seconds, probabilities."""
        schema = self._records.schema
        videos = _counted(self._records.videos(), shown)
        pieces = (piece for video in videos for piece in self._cut(video))
        while chunk := list(islice(pieces, batch_size)):
            batch = collate([piece for _, piece in chunk], schema)
            rows = as_probabilities(self.loaded.probabilities(batch), batch.ids, self._model)
            for (place, piece), row in zip(chunk, rows, strict=True):
                start, end = (frame / schema.frames_per_second for frame in place)
                yield piece.id, start, end, row


def _cutter(
    schema: Schema, length: float, stride: float
) -> Callable[[Video], Iterator[tuple[Window, Video]]]:
    """Return what cuts a video into windows, each with its frames as a video."""
    places_of = partial(
        windows, length=length, stride=stride, frames_per_second=schema.frames_per_second
    )
    try:
        places_of(1)
    except ValueError as error:
        raise RecordError(
            f"{str(error).capitalize()}.",
            hint="Give more seconds, or set frames_per_second in the records' schema.toml.",
        ) from error

    def cut(video: Video) -> Iterator[tuple[Window, Video]]:
        for place in places_of(video.num_frames):
            frames = {name: rows[slice(*place)] for name, rows in video.frames.items()}
            yield place, Video(video.id, video.classes, frames, video.is_labelled)

    return cut


def _counted(
    videos: Iterable[Video], shown: Callable[[int, str], None], nouns: str = "videos"
) -> Iterator[Video]:
    for number, video in enumerate(videos, start=1):
        yield video
        shown(number, nouns)


def _writer(output: Path) -> Callable[[IO[str], Iterable[Tagged], tuple[str, ...]], None]:
    writer = WRITERS.get(output.suffix.lower())
    if writer is None:
        raise OutputError(
            f"{output} does not end in .csv or .jsonl, and windows are written in no other format.",
            hint="Name a .csv file, or a .jsonl file for JSON lines.",
        )
    return writer


def _write_csv(file: IO[str], found: Iterable[Tagged], names: tuple[str, ...]) -> None:
    del names  # classes are numbers, as in the challenge's format
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(CSV_HEADER)
    for video, start, end, classes, confidences in found:
        lines.writerow([video, f"{start:g}", f"{end:g}", format_pairs(classes, confidences)])


def _write_json_lines(file: IO[str], found: Iterable[Tagged], names: tuple[str, ...]) -> None:
    for video, start, end, classes, confidences in found:
        labels = [
            {"label": names[index], "class": index, "confidence": round(confidence, 6)}
            for index, confidence in zip(classes.tolist(), confidences.tolist(), strict=True)
        ]
        line = {"video": video, "start": start, "end": end, "labels": labels}
        file.write(f"{json.dumps(line, ensure_ascii=False)}\n")


WRITERS: Mapping[str, Callable[[IO[str], Iterable[Tagged], tuple[str, ...]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
}
