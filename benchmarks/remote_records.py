"""Records at a URL, read through the cache, against the same records on this machine's disk.

    python benchmarks/remote_records.py [--quick] [--json]

The server is a local S3 server (moto) in another process, so nothing is waited for but the
server, the copy to the cache and the reading. Each reading is a fresh process, and reads all
shards to padded batches, checksums compared.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from common import (
    Figures,
    alone,
    in_turn,
    machine,
    parser_of,
    print_json,
    print_table,
    ratio,
    spread,
    versions,
)

PACKAGES = ("fsspec", "s3fs", "moto", "numpy")
SERVER = (
    "import sys, time; from moto.server import ThreadedMotoServer as Server; "
    "server = Server(ip_address='127.0.0.1', port=0, verbose=False); server.start(); "
    "print(*server.get_host_and_port(), flush=True); sys.stdin.read()"
)


def main() -> None:
    """Read from the disk, through an empty cache and through a full one, in turn."""
    options = parser_of(__doc__).parse_args()
    videos, rounds = (2_000, 1) if options.quick else (24_000, 3)
    before = machine()
    with tempfile.TemporaryDirectory() as folder, s3_server() as endpoint:
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }  # fmt: skip
        num_bytes = upload(Path(folder, "data"), videos)
        caches = (Path(folder, f"cache{number}") for number in range(rounds))
        full = Path(folder, "full")
        url = "s3://bucket/train"
        alone(read, url, full)
        found = in_turn(
            {
                "on this disk": partial(alone, read, str(Path(folder, "data", "train")), None),
                "S3, empty cache": lambda: alone(read, url, next(caches)),
                "S3, in the cache": partial(alone, read, url, full),
            },
            rounds=rounds,
        )
    seconds = {name: figures["seconds"] for name, figures in found.items()}
    ratios = {name: ratio(each, seconds["on this disk"]) for name, each in seconds.items()}
    if options.as_json:
        print_json(ratios=ratios, seconds=seconds, bytes=num_bytes, videos=videos)
        return
    print(f"{before}; {versions(*PACKAGES)[0]}; {videos:,} videos, {num_bytes / 2**20:.0f} MiB")
    print_table(
        ["records", "s", "times the disk"],
        [[name, spread(each), f"{ratios[name]:.2f}"] for name, each in seconds.items()],
    )


@contextmanager
def s3_server() -> Iterator[str]:
    """Start a server on this machine, and yield its URL."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            host, port = server.stdout.readline().split()
            yield f"http://{host}:{port}"
        finally:
            server.stdin.close()


def upload(folder: Path, videos: int) -> int:
    """Write records to two shards, put them in a bucket, and return their bytes."""
    import fsspec

    from ensemble_kit.data.synthetic import synthesize

    synthesize(folder, num_videos={"train": videos}, num_shards=2)
    files = fsspec.filesystem("s3")
    files.mkdir("bucket")
    shards = sorted((folder / "train").glob("*.tfrecord"))
    for path in [*folder.glob("*.*"), *shards]:
        files.pipe_file(f"bucket/{path.relative_to(folder)}", path.read_bytes())
    return sum(path.stat().st_size for path in shards)


def read(pattern: str, cache: Path | None) -> Figures:
    """Read all records once, and say how long it took."""
    from ensemble_kit.data.dataset import Records

    if cache is not None:
        import s3fs  # noqa: F401 - importing it is no part of reading

    start = time.perf_counter()
    count = sum(len(batch.ids) for batch in Records([pattern], cache=cache).batches(256))
    return {"seconds": time.perf_counter() - start, "videos": count}


if __name__ == "__main__":
    main()
