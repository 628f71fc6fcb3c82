"""YouTube-8M and AudioSet from where Google publishes them.

YouTube-8M, as the official ``data.yt8m.org/download.py`` does it: a plan at
``data.yt8m.org/{v}/download_plans/{level}_{split}.json`` lists the files of a partition with their
MD5; a file belongs to part m of n if ``md5(name) mod n == m - 1``; it lies at
``{mirror}.data.yt8m.org/{partition}/{name}``; the two letters that end its name are counted, so
that ``trainaB.tfrecord`` becomes ``train0027.tfrecord``. The servers speak plain HTTP; the MD5
finds damage, and is no proof of origin.

AudioSet: one archive of all features, unpacked beside it. Its MD5 is what the server says.

A file is written under another name, is continued there after whatever stopped it, and has its own
name only once its MD5 is right.
"""

import base64
import hashlib
import http.client
import os
import re
import shutil
import ssl
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import product
from pathlib import Path, PurePosixPath
from string import ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple

from ensemble_kit.choices import (
    AUDIOSET_SPLITS,
    DOWNLOAD_JOBS,
    DOWNLOAD_PART,
    MIRROR,
    AnyPath,
    Mirror,
)
from ensemble_kit.data.kinds import KINDS
from ensemble_kit.data.published import PUBLISHED
from ensemble_kit.data.schema import Modality, Schema, read_label_names, read_schema, write_schema
from ensemble_kit.errors import OutputError, RecordError, shown
from ensemble_kit.files import folder_written_aside, format_size, written_aside
from ensemble_kit.progress import progress
from ensemble_kit.texts import parse_json
from ensemble_kit.wording import counted

ATTEMPTS = 5  # of one file, each from where the one before stopped
FIRST_WAIT = 0.5  # seconds before the second; each wait is twice the one before
TIMEOUT = 60.0  # seconds without a byte
BLOCK_BYTES = 1 << 18
MAX_PLAN_BYTES = 2**26
COMING = ".download"  # the end of the name of a file that is not whole yet
PARTITION = re.compile(r"([123])/(frame|video|frame_level|video_level)/(train|validate|test)")
PLAN_NAME = re.compile(r"[A-Za-z0-9_-]*[A-Za-z0-9]{2}\.tfrecord", re.ASCII)
CONNECTION_ERRORS = (
    http.client.HTTPException, urllib.error.URLError, ConnectionError, ssl.SSLError
)  # fmt: skip
LETTERS = ascii_lowercase + ascii_uppercase + digits
NUMBERS = {"".join(pair): number for number, pair in enumerate(product(LETTERS, repeat=2))}
AGAIN = "Run the same command again: what is whole is kept, and the rest is continued."
ARCHIVE = "features.tar.gz"
ARCHIVE_ROOM = 3  # times its size, for what is unpacked of it
ARCHIVE_FOLDER = "audioset_v1_embeddings"
VOCABULARY, CLASS_LABELS = "vocabulary.csv", "class_labels_indices.csv"


class Wanted(NamedTuple):
    """One file that is to be on this disk.

    Attributes:
        url: Where it lies.
        path: Where it is to be.
        md5: Its MD5 in hexadecimal digits, or None where nobody says.
    """

    url: str
    path: Path
    md5: str | None


class Downloaded(NamedTuple):
    """What a download has left.

    Attributes:
        folder: The folder.
        num_files: How many files of records it was to bring.
        num_new: How many of them were not there before.
        num_bytes: How many bytes were fetched.
        schema: What the records hold.
    """

    folder: Path
    num_files: int
    num_new: int
    num_bytes: int
    schema: Schema


def download_youtube8m(
    folder: AnyPath,
    *,
    partition: str,
    shard: tuple[int, int] = DOWNLOAD_PART,
    mirror: Mirror = MIRROR,
    jobs: int = DOWNLOAD_JOBS,
    base_url: str | None = None,
) -> Downloaded:
    """Bring files of YouTube-8M to a folder, with ``schema.toml`` and ``vocabulary.csv``.

    Files that the folder holds with the right MD5 are kept. The same command continues what was
    stopped, and two at once share the work.

    Args:
        folder: Where to; made if need be.
        partition: ``2/frame/train``: the version, 1 (2017), 2 (2018) or 3 (2019, labelled
            segments), then ``frame`` or ``video``, then ``train``, ``validate`` or ``test``.
        shard: Part m of n of the files, ``(m, n)``.
        mirror: The server's region.
        jobs: How many files to fetch at a time.
        base_url: A server that has all of it under one URL, the vocabulary as
            ``{v}/vocabulary.csv``.

    Raises:
        RecordError: There is no such partition, the plan is no plan, a file cannot be fetched, or
            its MD5 stays wrong.
        OutputError: The disk is too small or refuses a file, or the folder has another schema.
    """
    folder = Path(folder)
    match = PARTITION.fullmatch(partition)
    if not match:
        raise RecordError(
            f"{shown(partition)} is no partition of YouTube-8M.",
            hint="Write version, level and split, as 2/frame/train or 3/frame/validate.",
        )
    version, level, split = match.groups()
    if version == "1" and not level.endswith("_level"):
        level = f"{level}_level"  # as the first version calls it
    plain = base_url or "http://data.yt8m.org"
    plan_url = f"{plain}/{version}/download_plans/{level}_{split}.json"
    files = _plan(plan_url, shard)
    server = base_url or f"http://{mirror}.data.yt8m.org"
    wanted = [
        Wanted(f"{server}/{version}/{level}/{split}/{name}", folder / numbered(name), md5)
        for name, md5 in files.items()
    ]
    # the third version has the classes of the second
    list_version = min(version, "2")
    vocabulary = (
        f"{base_url}/{version}/{VOCABULARY}"
        if base_url
        else f"https://research.google.com/youtube8m/csv/{list_version}/{VOCABULARY}"
    )
    schema = _youtube8m_schema(version, level)
    schema = _write_schema(folder, schema, Wanted(vocabulary, folder / VOCABULARY, None))
    with progress("downloading", len(wanted)) as bar:
        num_new, num_bytes = _fetch_all(wanted, jobs, bar.update)
    return Downloaded(folder, len(wanted), num_new, num_bytes, schema)


def download_audioset(
    folder: AnyPath,
    *,
    mirror: Mirror = MIRROR,
    base_url: str | None = None,
) -> Downloaded:
    """Bring AudioSet's features to a folder, with ``schema.toml`` and its class labels.

    The archive of 2.4 GB is unpacked into ``bal_train``, ``unbal_train`` and ``eval``; it stays in
    the folder, so that the same command finds nothing left to do.

    Args:
        folder: Where to; made if need be.
        mirror: The server's region.
        base_url: A server that has all of it under one URL, as ``features/features.tar.gz`` and
            ``csv/class_labels_indices.csv``.

    Raises:
        RecordError: A file cannot be fetched, its MD5 stays wrong, or the archive holds something
            else.
        OutputError: The disk is too small or refuses a file, or the folder has another schema.
    """
    folder = Path(folder)
    server = base_url or f"http://storage.googleapis.com/{mirror}_audioset/youtube_corpus/v1"
    archive = Wanted(f"{server}/features/{ARCHIVE}", folder / ARCHIVE, None)
    labels = Wanted(f"{server}/csv/{CLASS_LABELS}", folder / CLASS_LABELS, None)
    schema = _write_schema(folder, PUBLISHED["audioset"], labels)
    with progress("downloading", 1) as bar:
        num_new, num_bytes = _fetch_all([archive], 1, bar.update, room=ARCHIVE_ROOM)
    num_files = _unpack(archive.path, folder)
    return Downloaded(folder, num_files, num_files if num_new else 0, num_bytes, schema)


def numbered(name: str) -> str:
    """Return a file's name with its two letters as a number: ``trainaB.tfrecord`` as above."""
    stem, _, end = name.partition(".")
    return f"{stem[:-2]}{NUMBERS[stem[-2:]]:04d}.{end}"


def _plan(url: str, shard: tuple[int, int]) -> dict[str, str]:
    """Return the MD5 of each file of a part by its name, sorted by the number in it."""
    part, num_parts = shard
    if not 1 <= part <= num_parts:
        raise RecordError(
            f"There is no part {part} of {num_parts}.", hint="Write M,N with M from 1 to N."
        )
    problem = ""
    with _opened(url, 0) as answer:
        content = answer.read(MAX_PLAN_BYTES + 1)
    try:
        files = parse_json(content[:MAX_PLAN_BYTES])["files"]
        for name, md5 in files.items():
            if not PLAN_NAME.fullmatch(name) or not re.fullmatch("[0-9a-f]{32}", md5, re.ASCII):
                problem = f"{shown(name)}: {shown(md5)}"
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = shown(content[:200])
    if problem:
        raise RecordError(
            f"{url} is no plan of files with their MD5: {problem}.",
            hint="Check the URL, or name another mirror or another partition.",
        )
    kept = {
        name: md5
        for name, md5 in files.items()
        if int(hashlib.md5(name.encode()).hexdigest(), 16) % num_parts == part - 1
    }
    if not kept:
        raise RecordError(
            f"Part {part} of {num_parts} of {len(files)} files has none.",
            hint="Name another part, or ask for fewer parts.",
        )
    return dict(sorted(kept.items(), key=lambda item: numbered(item[0])))


def _fetch_all(
    wanted: Sequence[Wanted], jobs: int, report: Callable[[int], None], *, room: int = 1
) -> tuple[int, int]:
    """Fetch what is not there yet; return how many files that were, and how many bytes.

    ``room`` is how many times its size a file will take, with what is unpacked of it.
    """
    folder = wanted[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror}.", hint="Name a folder you may write to."
        ) from error
    stop = threading.Event()
    pool = ThreadPoolExecutor(jobs)
    try:
        is_there = list(pool.map(_is_whole, wanted))
        missing = [each for each, there in zip(wanted, is_there, strict=True) if not there]
        num_done = len(wanted) - len(missing)
        sizes = list(pool.map(_left_of, missing))
        free, needed = shutil.disk_usage(folder).free, sum(sizes) * room
        if needed > free:
            raise OutputError(
                f"{folder} has {format_size(free)} left, but {format_size(needed)} are to come in "
                f"{counted(len(missing), 'file')}.",
                hint="Free some space, name a folder on another disk, or ask for a smaller part.",
            )
        coming = [pool.submit(_fetch, each, stop) for each in missing]
        problems, num_bytes = [], 0
        for future in as_completed(coming):
            try:
                num_bytes += future.result()
            except RecordError as error:  # the others may still be fetched
                problems.append(error)
            else:
                num_done += 1
                report(num_done)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if problems:
        raise RecordError(
            f"{len(problems):,} of {counted(len(wanted), 'file')} could not be fetched; the first: "
            f"{problems[0].problem}",
            hint=AGAIN,
        )
    return len(missing), num_bytes


def _is_whole(wanted: Wanted) -> bool:
    """Return whether a file is there with its MD5; where nobody says that, with its size."""
    if not os.path.isfile(wanted.path):
        return False
    if wanted.md5 is not None:
        return _md5_of(wanted.path) == wanted.md5
    with _opened(wanted.url, 0, method="HEAD") as answer:
        said = _said_md5(answer)
        if said is not None:
            return _md5_of(wanted.path) == said
        return wanted.path.stat().st_size == int(answer.headers.get("Content-Length") or -1)


def _left_of(wanted: Wanted) -> int:
    """Return how many bytes of a file are still to come."""
    with _opened(wanted.url, 0, method="HEAD") as answer:
        size = int(answer.headers.get("Content-Length") or 0)
    coming = _coming(wanted.path)
    return max(0, size - (coming.stat().st_size if os.path.isfile(coming) else 0))


def _fetch(wanted: Wanted, stop: threading.Event) -> int:
    """Fetch one file, continued where it stopped; return how many bytes came.

    Another process that fetches the same file is waited for, and then there is nothing left to do.
    """
    from filelock import FileLock

    coming = _coming(wanted.path)
    with FileLock(coming.with_name(f"{coming.name}.lock")):
        if _is_whole(wanted):
            return 0
        num_bytes = 0
        for attempt in range(ATTEMPTS):
            try:
                num, said = _continue(wanted, coming, stop)
                num_bytes += num
                found, md5 = _md5_of(coming), wanted.md5 or said
                if md5 is None or found == md5:
                    coming.replace(wanted.path)
                    return num_bytes
                coming.unlink()  # whatever is wrong in it stays wrong
                reason = f"its MD5 is {found}, expected {md5}"
            except CONNECTION_ERRORS as error:
                reason = _reason(error)
            except TimeoutError:
                reason = f"no byte came for {TIMEOUT:.0f} seconds"
            except OSError as error:
                raise OutputError(
                    f"{wanted.path} cannot be written: {error.strerror}.",
                    hint="Free some space, and run the same command again: it continues.",
                ) from error
            if stop.wait(FIRST_WAIT * 2**attempt if attempt < ATTEMPTS - 1 else 0):
                break
    raise RecordError(f"{wanted.url} cannot be fetched: {reason}.", hint=AGAIN)


def _continue(wanted: Wanted, coming: Path, stop: threading.Event) -> tuple[int, str | None]:
    """Fetch the rest of a file; return how many bytes came, and its MD5 if the server says it."""
    start = coming.stat().st_size if os.path.isfile(coming) else 0
    with _answer(wanted.url, start) as answer, coming.open("ab" if start else "wb") as file:
        if start and answer.status != 206:  # the server cannot continue: from the beginning
            file.truncate(0)
            start = 0
        length = answer.headers.get("Content-Length")
        num_bytes = 0
        while block := answer.read(BLOCK_BYTES):
            file.write(block)
            num_bytes += len(block)
            if stop.is_set():
                raise ConnectionError("the download was stopped")
        if length is not None and num_bytes < int(length):
            raise ConnectionError(f"{num_bytes:,} bytes came of {int(length):,}")
        file.flush()
        os.fsync(file.fileno())
        return num_bytes, _said_md5(answer)


def _answer(url: str, start: int, method: str = "GET") -> http.client.HTTPResponse:
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
        return answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing is left after what is here, or it is another file
            return _answer(url, 0, method)
        raise


@contextmanager
def _opened(url: str, start: int, method: str = "GET") -> Iterator[http.client.HTTPResponse]:
    """Yield the answer to a request, repeated while the server is busy.

    Raises:
        RecordError: It failed each time.
    """
    for attempt in range(ATTEMPTS):
        try:
            answer = _answer(url, start, method)
            break
        except (http.client.HTTPException, OSError, ValueError) as error:
            is_busy = not isinstance(error, urllib.error.HTTPError) or error.code >= 500
            if attempt == ATTEMPTS - 1 or not is_busy or isinstance(error, ValueError):
                raise RecordError(
                    f"{url} cannot be fetched: {_reason(error)}.",
                    hint="Check the URL and the connection, or name another mirror.",
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt)
    with answer:
        yield answer


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split())[:200] or type(error).__name__


def _said_md5(answer: http.client.HTTPResponse) -> str | None:
    """Return the MD5 that Google's storage says a file has."""
    for value in answer.headers.get_all("x-goog-hash") or ():
        for part in value.split(","):
            name, _, encoded = part.strip().partition("=")
            if name == "md5":
                return base64.b64decode(encoded).hex()
    return None


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _coming(path: Path) -> Path:
    return path.with_name(f".{path.name}{COMING}")


def _youtube8m_schema(version: str, level: str) -> Schema:
    if level.startswith("frame"):
        return PUBLISHED["youtube8m-2017" if version == "1" else "youtube8m-2018"]
    id_key = "video_id" if version == "1" else "id"
    kind = next(kind for kind in KINDS if kind.level == "video" and kind.id_key == id_key)
    widths = PUBLISHED["youtube8m-2018"].widths
    return Schema(
        level="video",
        modalities=tuple(
            Modality(name=name, key=key, width=widths[name], value_type="float32")
            for name, key in kind.modalities
        ),
        id_key=id_key,
        labels_key="labels",
        num_classes=kind.num_classes,
    )


def _write_schema(folder: Path, schema: Schema, names: Wanted) -> Schema:
    """Write the file of classes and the schema beside the records, unless both are there.

    Raises:
        OutputError: There is another schema.
    """
    path = folder / "schema.toml"
    if os.path.isfile(path):
        held = read_schema(path)
        if held.model_copy(update={"label_names": None}) != schema:
            raise OutputError(
                f"{path} describes other records.", hint="Name a folder for these records alone."
            )
        return held
    if not os.path.isfile(names.path):
        with _opened(names.url, 0) as answer:
            content = answer.read(MAX_PLAN_BYTES)
        with written_aside(names.path, force=True) as aside:  # another download may do the same
            aside.write_bytes(content)
    schema = schema.model_copy(
        update={"label_names": read_label_names(names.path, schema.num_classes)}
    )
    write_schema(schema, path, label_names_file=names.path.name, force=True)
    return schema


def _unpack(archive: Path, folder: Path) -> int:
    """Unpack the folders of AudioSet's archive that are not there yet; return their files.

    Nothing is written but files of records in those folders, whatever names the archive holds.

    Raises:
        RecordError: The archive is damaged or holds no records.
    """
    missing = [split for split in AUDIOSET_SPLITS if not os.path.isdir(folder / split)]
    if missing:
        with folder_written_aside(folder / ARCHIVE_FOLDER, force=False) as aside:
            try:
                with tarfile.open(archive, "r|gz") as packed:
                    for member in packed:
                        place = PurePosixPath(member.name)
                        if (
                            member.isfile()
                            and place.suffix == ".tfrecord"
                            and (place.parent.name in missing)
                        ):
                            _write_member(packed, member, aside / place.parent.name / place.name)
            except (tarfile.TarError, EOFError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise RecordError(
                    f"{archive} is damaged: {error}.", hint=f"Remove it. {AGAIN}"
                ) from error
            for split in missing:
                if not os.path.isdir(aside / split):
                    raise RecordError(
                        f"{archive} holds no records in {split}/.",
                        hint="Check --base-url: this is not AudioSet's archive of features.",
                    )
        for split in missing:
            (folder / ARCHIVE_FOLDER / split).replace(folder / split)
        (folder / ARCHIVE_FOLDER).rmdir()
    return sum(len(list((folder / split).glob("*.tfrecord"))) for split in AUDIOSET_SPLITS)


def _write_member(packed: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = packed.extractfile(member)
    assert content is not None  # a plain file has some
    path.parent.mkdir(exist_ok=True)
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file, BLOCK_BYTES)
