"""Records at a URL or gzipped: whole shards, through a cache on this machine's disk.

A shard is always fetched whole, never by ranges: a training order reads a record here and a record
there, and a request for each would cost more than the shard. Readers see paths and do not change.
A shard's place in the cache is a path that says its URL and, by a hash, its version::

    CACHE/s3/bucket/train/train0000.5f1c09ab.tfrecord        the shard, if it is there now
    CACHE/s3/bucket/train/train0000.5f1c09ab.tfrecord.json   where it comes from, its size

``ready`` fetches what is not there. It needs that second file and no other state, so it also works
in processes that read ahead. A shard that changes at its URL gets another place, so that two
versions are never mixed.

A gzipped shard, here or at a URL, is expanded into the cache: training reads a record here and a
record there, and gzip can only be read from its start.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from ensemble_kit.errors import RecordError
from ensemble_kit.files import format_size, written_aside
from ensemble_kit.gzipped import expanded

ATTEMPTS = 4  # of one request: servers that are busy answer 503 and are well a moment later
FIRST_WAIT = 0.25  # seconds before the second attempt; each wait is twice the one before
AHEAD = 2  # shards fetched while one is read
ORIGIN = ".json"  # suffix of the file that says where a shard comes from
GZ = ".gz"  # the end of a gzipped file's name
LOCAL = "file://"
BLOCK_BYTES = 1 << 20  # expanded at once
T = TypeVar("T")
CHECK_URL = "Check the URL, and that this machine may read it."
# What identifies a file's version; each kind of server has its own word for it.
VERSIONS = (
    "ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "updated", "mtime",
    "created",
)  # fmt: skip


class Origin(NamedTuple):
    """Where a shard of the cache comes from.

    Attributes:
        url: Its URL.
        version: The server's ETag, else another of ``VERSIONS``, else its size.
        num_bytes: Its size.
        cache: The cache's folder.
        cache_bytes: Maximum size of all shards of the cache, in bytes.
        is_gzipped: Whether the shard is expanded; ``num_bytes`` is its size before that.
    """

    url: str
    version: str
    num_bytes: int
    cache: str
    cache_bytes: int
    is_gzipped: bool = False

    @property
    def place(self) -> Path:
        """The shard's path in the cache."""
        protocol, _, rest = self.url.partition("://")
        name = PurePosixPath(rest.removesuffix(GZ) if self.is_gzipped else rest)
        digest = hashlib.sha256(f"{self.url} {self.version}".encode()).hexdigest()[:8]
        parts = [part for part in name.parent.parts if part not in ("/", "..")]
        return Path(self.cache, protocol, *parts, f"{name.stem}.{digest}{name.suffix}")


def is_url(pattern: str | Path) -> bool:
    """Return whether a pattern is a URL, as ``gs://bucket/train/*.tfrecord``."""
    return "://" in str(pattern)


def default_cache() -> Path:
    """Return the folder of the cache where none is named: ``$XDG_CACHE_HOME/ensemble-kit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ensemble-kit"


def find_shards(pattern: str, *, cache: Path, cache_bytes: int) -> list[Path]:
    """Return the places in the cache of the shards that a URL matches, sorted by URL.

    Nothing is fetched but ``schema.toml`` beside the first shard or in the folder above.

    Args:
        pattern: A URL, with ``*``, ``?`` and ``[]`` as in a glob where its server lists folders;
            one of a folder stands for its ``*.tfrecord``.
        cache: The cache's folder.
        cache_bytes: Maximum size of all shards of the cache, in bytes.

    Raises:
        RecordError: Nothing matches, the server cannot be reached, or the URL's kind needs a
            package that is not installed.
    """
    files = _file_system(pattern)
    found = _asked(pattern, lambda: _listed(files, pattern))
    if not found:
        raise RecordError(f"{pattern} matches no file.", hint=CHECK_URL)
    places = []
    for url, info in sorted(found.items()):
        if info["size"] is None:
            raise RecordError(
                f"{url}: its server does not say how large it is.",
                hint="Copy the files to this machine, or serve them with a Content-Length.",
            )
        size, is_gzipped = int(info["size"]), url.endswith(GZ)
        origin = Origin(url, _version(info), size, str(cache), cache_bytes, is_gzipped)
        places.append(_registered(origin))
    _fetch_schema(files, min(found), places[0].parent)
    return places


def expanded_place(path: Path, *, cache: Path, cache_bytes: int) -> Path:
    """Return the place in the cache of a gzipped file of this machine; ``ready`` expands it there.

    Args:
        path: The file, absolute.
        cache: The cache's folder.
        cache_bytes: Maximum size of all shards of the cache, in bytes.

    Raises:
        RecordError: The file cannot be read.
    """
    url = f"{LOCAL}{path}"
    info = _asked(url, lambda: _file_system(LOCAL).info(str(path)))
    origin = Origin(url, _version(info), int(info["size"]), str(cache), cache_bytes, True)
    return _registered(origin)


def folder_of(path: Path) -> Path:
    """Return the folder that a file's schema is looked for in: for an expanded one, its source's.

    Args:
        path: A file of records.
    """
    origin = origin_of(path)
    if origin is not None and origin.url.startswith(LOCAL):
        return Path(origin.url.removeprefix(LOCAL)).parent
    return path.parent


def _registered(origin: Origin) -> Path:
    """Write down where a shard comes from; return its place."""
    place = origin.place
    place.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(_origin_path(place), force=True) as aside:
        aside.write_text(json.dumps(origin._asdict()), encoding="utf-8")
    return place


def ready(path: Path) -> Path:
    """Return a path whose file is there, fetched first if it is a shard of a cache that is not.

    Any other path is returned as it is.

    Raises:
        RecordError: The shard has gone, has changed, or cannot be fetched; or it is larger than the
            cache may be.
    """
    origin = origin_of(path)
    if origin is None:
        return path
    if _is_whole(path, origin):
        with suppress(OSError):
            os.utime(path)  # the cache drops what was used longest ago
        return path
    from filelock import FileLock

    with FileLock(f"{path}.lock"):
        if not _is_whole(path, origin):  # another process may have fetched it meanwhile
            _fetch(path, origin)
    return path


def open_ready(path: Path, opener: Callable[[Path], T]) -> T:
    """Return what ``opener`` makes of a path whose file is there, fetched first as by ``ready``.

    A shard that others have the cache drop in that moment is fetched again.

    Raises:
        RecordError: See ``ready``.
        OSError: The file cannot be opened.
    """
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError):
            return opener(ready(path))
        if origin_of(path) is None:
            break
    return opener(ready(path))


def ahead(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield paths whose files are there, fetching the next shards while one is read."""
    if not any(map(origin_of, paths)):
        yield from paths
        return
    with ThreadPoolExecutor(AHEAD) as threads:
        coming: list[Future[Path]] = []
        try:
            for index, _ in enumerate(paths):
                coming += [
                    threads.submit(ready, path)
                    for path in paths[index + len(coming) : index + 1 + AHEAD]
                ]
                yield coming.pop(0).result()
        finally:
            for future in coming:
                future.cancel()


def origin_of(path: Path) -> Origin | None:
    """Return where a shard of a cache comes from; None for any other path."""
    try:
        text = _origin_path(path).read_text(encoding="utf-8")
        return Origin(**json.loads(text))
    except (OSError, ValueError, TypeError):  # TypeError: somebody else's JSON beside a record file
        return None


def _origin_path(path: Path) -> Path:
    return path.with_name(path.name + ORIGIN)


def _is_whole(path: Path, origin: Origin) -> bool:
    try:
        return path.stat().st_size == origin.num_bytes or origin.is_gzipped
    except OSError:
        return False


def _version(info: Mapping[str, Any]) -> str:
    return str(next((info[key] for key in VERSIONS if info.get(key)), info["size"]))


def _file_system(url: str) -> Any:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)[0]
    except ImportError as error:
        package = {
            "s3": "s3fs",
            "gs": "gcsfs",
            "gcs": "gcsfs",
            "http": "aiohttp",
            "https": "aiohttp",
        }
        protocol = url.partition("://")[0]
        name = package.get(protocol, "the package that fsspec names")
        raise RecordError(
            f"{url} needs a package that is not installed: {error}.",
            hint=f"Install it: pip install {name}.",
        ) from error
    except ValueError as error:
        raise RecordError(f"{url} cannot be read: {error}.", hint=CHECK_URL) from error


def _listed(files: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """Return what the server says of each file that a pattern matches, by URL."""
    from glob import has_magic

    patterns = [pattern]
    if not has_magic(pattern):
        if not pattern.endswith("/"):  # at which a web server would have a page
            info = files.info(pattern)
            if info["type"] != "directory":
                return {pattern: info}
        everything = f"{pattern.rstrip('/')}/*.tfrecord"
        patterns = [everything, f"{everything}{GZ}"]
    found = {
        name if is_url(name) else files.unstrip_protocol(name): info
        for each in patterns
        for name, info in files.glob(each, detail=True).items()
        if info["type"] == "file"
    }
    if all(info.get("ETag") or info.get("etag") for info in found.values()):
        return found
    with ThreadPoolExecutor(8) as threads:  # a listing that says less than a request for each file
        return dict(zip(found, threads.map(files.info, found), strict=True))


def _asked(url: str, request: Callable[[], T]) -> T:
    """Return what a request returns, repeated while the server is busy.

    Raises:
        RecordError: It failed each time, or the file is not there.
    """
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except RecordError:
            raise
        except Exception as error:  # each file system has its own exceptions, without a base
            cause = error.__cause__ or error
            if isinstance(error, FileNotFoundError) and _says_gone(cause):
                raise RecordError(f"{url} does not exist.", hint=CHECK_URL) from error
            if attempt == ATTEMPTS - 1:
                reason = " ".join(str(cause).split()) or type(cause).__name__
                raise RecordError(
                    f"{url} cannot be fetched: {reason[:200]}.",
                    hint="See that this machine may read it, or try again later; what was fetched "
                    "before is kept in the cache.",
                ) from error
        time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _says_gone(cause: BaseException) -> bool:
    """Return whether the cause of a ``FileNotFoundError`` is that there is no such file.

    Over HTTP fsspec raises it for a server that is busy or does not answer, too.
    """
    status = getattr(cause, "status", None)
    if status is not None:
        return bool(status == 404)
    is_answer = not isinstance(cause, OSError) and not type(cause).__module__.startswith("aiohttp")
    return is_answer or isinstance(cause, FileNotFoundError)


def _fetch(path: Path, origin: Origin) -> None:
    """Fetch a shard to its place, whole or not at all."""
    files = _file_system(origin.url)
    files.invalidate_cache()  # of listings
    info = _asked(origin.url, lambda: files.info(origin.url))
    if _version(info) != origin.version:
        raise RecordError(
            f"{origin.url} has changed since the reading began.",
            hint="Start again, and leave the records as they are while they are read.",
        )
    _make_room(path, origin, origin.num_bytes)
    with written_aside(path, force=True) as aside:
        if origin.is_gzipped:
            _asked(origin.url, lambda: _expand(files, origin, aside))
            size = aside.stat().st_size
            _make_room(path, origin, size, is_there=True)
        else:
            _asked(origin.url, lambda: _download(files, origin, aside))


def _download(files: Any, origin: Origin, aside: Path) -> None:
    files.get_file(origin.url, str(aside))
    size = aside.stat().st_size
    if size != origin.num_bytes:
        raise OSError(f"{size:,} bytes came of {origin.num_bytes:,}")


def _expand(files: Any, origin: Origin, aside: Path) -> None:
    """Write what a gzipped shard holds, up to the size of the cache.

    Raises:
        RecordError: The gzip stream is damaged, or holds more than the cache may, or than
            ``expanded`` allows.
    """
    with (
        files.open(origin.url, "rb") as packed,
        expanded(packed, origin.num_bytes) as stream,
        aside.open("wb") as file,
    ):
        while True:
            try:
                block = stream.read(BLOCK_BYTES)
            except OSError as error:
                if error.errno not in (
                    errno.EIO,
                    errno.EFBIG,
                ):  # the connection's, not the stream's
                    raise
                raise RecordError(
                    f"{origin.url} cannot be read: {error.strerror}.",
                    hint="Copy the file again from where it is whole, or leave it out.",
                ) from error
            if not block:
                return
            if file.tell() + len(block) > origin.cache_bytes:
                raise _too_large(origin, file.tell() + len(block), is_limit=True)
            file.write(block)


def _make_room(path: Path, origin: Origin, num_bytes: int, *, is_there: bool = False) -> None:
    """Remove the shards used longest ago, until another one fits the cache and the disk.

    None is removed for one that would not fit an empty cache.

    Args:
        path: Its place.
        origin: Where it comes from.
        num_bytes: Its size.
        is_there: Whether the disk holds it already.

    Raises:
        RecordError: It cannot fit.
    """
    if num_bytes > origin.cache_bytes:
        raise _too_large(origin, num_bytes, is_limit=True)
    shards = []
    for other in Path(origin.cache).rglob(f"*{ORIGIN}"):
        shard = other.with_name(other.name.removesuffix(ORIGIN))
        with suppress(OSError):
            status = shard.stat()
            shards.append((status.st_mtime_ns, status.st_size, shard))
    total = sum(size for _, size, _ in shards) + num_bytes
    free = shutil.disk_usage(path.parent).free - (0 if is_there else num_bytes)
    for _, size, shard in sorted(shards):
        if total <= origin.cache_bytes and free >= 0:
            break
        shard.unlink(missing_ok=True)  # a process that reads it keeps what it has open
        total, free = total - size, free + size
    if free < 0:
        raise _too_large(origin, num_bytes, is_limit=False)


def _too_large(origin: Origin, num_bytes: int, *, is_limit: bool) -> RecordError:
    limit = (
        f"the cache may hold {format_size(origin.cache_bytes)}"
        if is_limit
        else f"the disk of {origin.cache} is full"
    )
    return RecordError(
        f"{origin.url} takes {format_size(num_bytes)}, but {limit}.",
        hint="Name a folder on a larger disk with --cache, or raise --cache-size.",
    )


def _fetch_schema(files: Any, url: str, folder: Path) -> None:
    """Fetch the schema beside a shard or in the folder above it, and its file of label names."""
    above = url.rpartition("/")[0]
    for place in (above, above.rpartition("/")[0]):
        try:
            found = {"schema.toml": files.cat_file(f"{place}/schema.toml")}
            names_file = tomllib.loads(found["schema.toml"].decode()).get("label_names")
            if isinstance(names_file, str) and "/" not in names_file:
                found[names_file] = files.cat_file(f"{place}/{names_file}")
        except Exception:  # there is none, or the server does not say: records have keys to go by
            continue
        for name, content in found.items():
            with written_aside(folder / name, force=True) as aside:
                aside.write_bytes(content)
        return
