"""Videos and bytes a second from records to padded batches, beside the peers that read them.

    python benchmarks/read_records.py [DATA] [--quick] [--json] [--tensorflow PYTHON]

Records of 300 frames of 1,024 and 128 bytes are made for it; with DATA, the folder that the
examples take, real AudioSet frames and YouTube-8M video-level records are read too. Everybody reads
from the page cache, each in its own process, on as many cores as the table says. The kit and
tf.data compare both checksums and protobuf's reader the kit's; ``tfrecord`` compares none. Only
the kit shuffles, the others read in the order of the files. ``tfrecord`` and protobuf know no
second core: two processes read half of the files each, and nobody brings their batches together.
``--tensorflow`` names another Python that has TensorFlow, where this one has not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

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
from record_readers import (
    BATCH_SIZE,
    Case,
    padded,
    protobuf_videos,
    read_ours,
    read_tensorflow,
    tfrecord_videos,
)

WARM_BATCHES = 6  # not timed: processes start, graphs are traced, memory is touched
SECONDS, QUICK_SECONDS = 3.0, 0.3
FRAMES_CHOSEN = 30  # of 300, where the kit copies only what is drawn
PACKAGES = ("numpy", "crc32c", "protobuf", "tfrecord", "tensorflow-cpu")
OURS, CHOSEN = "ensemble-kit", f"ensemble-kit, {FRAMES_CHOSEN} frames drawn"
BY_PAD = "np.pad, np.stack"


def case_of(title: str, folder: Path) -> Case:
    from ensemble_kit.data.dataset import Records

    records = Records([folder])
    schema = records.schema
    files = [str(path) for path in records.paths]
    num_bytes = sum(os.path.getsize(file) for file in files)  # and so into the page cache
    streams = [(modality.key, modality.width) for modality in schema.modalities]
    return Case(title, files, schema.level, schema.id_key, streams, num_bytes / records.count())


def cases_of(data: Path | None, folder: Path, *, is_quick: bool) -> Iterator[Case]:
    from ensemble_kit.data.synthetic import synthesize

    size = {"modalities": {"rgb": 1024, "audio": 128}, "num_classes": 3862, "frames": (300, 300)}
    num_videos = 160 if is_quick else 640
    synthesize(folder, num_videos={"train": num_videos}, num_shards=4, **size)
    yield case_of("made up, 300 frames of 1,152 bytes", folder / "train")
    if data is not None:
        yield case_of("AudioSet, frame level", data / "audioset" / "frame" / "train")
        yield case_of("YouTube-8M, video level", data / "yt8m" / "video" / "train")


# --- timing


def timed(
    read: Callable[[Case, int], Iterator[int]], case: Case, cores: list[int], seconds: float
) -> Figures:
    """Return the videos a second after the first batches, on some cores, for some seconds.

    The CPU time is this process's: where others help it, it says nothing.
    """
    os.sched_setaffinity(0, cores)
    batches = read(case, len(cores))
    for _ in islice(batches, WARM_BATCHES):
        pass
    num_videos, start, start_cpu, elapsed = 0, time.perf_counter(), time.process_time(), 0.0
    while elapsed < seconds:
        num_videos += next(batches)
        elapsed = time.perf_counter() - start
    cpu = time.process_time() - start_cpu
    batches.close()
    return {"videos_per_second": num_videos / elapsed, "cpu_seconds_per_video": cpu / num_videos}


def timed_apart(
    read: Callable[[Case, int], Iterator[int]], case: Case, cores: list[int], seconds: float
) -> Figures:
    """Return the sum of what one process a core reads of its share of the files."""
    shares = [case._replace(files=case.files[n :: len(cores)]) for n in range(len(cores))]
    with ThreadPoolExecutor(len(cores)) as pool:
        found = pool.map(
            lambda share, core: alone(timed, read, share, [core], seconds), shares, cores
        )
        return {"videos_per_second": sum(figures["videos_per_second"] for figures in found)}


def timed_tensorflow(python: str, case: Case, cores: list[int], seconds: float) -> Figures:
    """Return what another Python measures of tf.data."""
    question = json.dumps([case, cores, seconds])
    done = subprocess.run(
        [python, __file__, "--answer"],
        input=question,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def answer() -> None:
    case, cores, seconds = json.load(sys.stdin)
    figures = timed(read_tensorflow, Case(*case), cores, seconds)
    print(json.dumps({**figures, "peak_bytes": peak_bytes()}))


def readers_of(
    case: Case, cores: list[int], seconds: float, tensorflow: str | None, missing: list[str]
) -> dict[str, Callable[[], Figures]]:
    work = {OURS: partial(alone, timed, read_ours, case, cores, seconds)}
    if case.level == "frame":
        chosen = partial(read_ours, num_chosen=FRAMES_CHOSEN)
        work[CHOSEN] = partial(alone, timed, chosen, case, cores, seconds)
    if tensorflow is not None:
        work["tf.data"] = partial(timed_tensorflow, tensorflow, case, cores, seconds)
    by_hand = {"protobuf by hand": protobuf_videos, "tfrecord": tfrecord_videos}
    for name, videos in by_hand.items():
        if name not in missing:
            read = partial(padded, videos)
            how = (alone, timed) if len(cores) == 1 else (timed_apart,)
            work[name] = partial(*how, read, case, cores, seconds)
    return work


# --- collation


def time_collation(name: str, seconds: float) -> Figures:
    """Return seconds and bytes that one batch of 20 to 300 frames takes to collate."""
    from ensemble_kit.data.batch import collate
    from ensemble_kit.data.decode import Video
    from ensemble_kit.data.schema import Modality, Schema

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    random = np.random.default_rng(0)
    widths = {"rgb": 1024, "audio": 128}
    modalities = [
        Modality(name=key, key=key, width=width, value_type="uint8")
        for key, width in widths.items()
    ]
    schema = Schema(
        level="frame", modalities=modalities, id_key="id", labels_key="labels", num_classes=3862
    )
    videos = []
    for number, length in enumerate(random.integers(20, 301, BATCH_SIZE).tolist()):
        frames = {key: random.integers(0, 256, (length, w), np.uint8) for key, w in widths.items()}
        videos.append(Video(str(number), np.arange(3), frames))

    def by_pad() -> object:
        longest = max(video.num_frames for video in videos)
        return [
            np.stack([
                np.pad(video.frames[key], ((0, longest - video.num_frames), (0, 0)))
                for video in videos
            ])
            for key in widths
        ]  # fmt: skip

    make = {OURS: partial(collate, videos, schema), BY_PAD: by_pad}[name]
    make()
    tracemalloc.start()
    held = make()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    num_batches, start, elapsed = 0, time.process_time(), 0.0
    while elapsed < seconds:
        held = make()
        num_batches += 1
        elapsed = time.process_time() - start
    del held
    return {"seconds": elapsed / num_batches, "allocated_bytes": traced}


# --- what is printed


Found = dict[str, dict[str, list[float]]]  # the values of each figure, by reader


def report(case: Case, one: Found, two: Found, copied: float) -> None:
    """Print the table of a case, on one core and on two."""
    print(f"\n{case.title}: {len(case.files)} files, {case.video_bytes / 1e3:,.1f} kB a video")
    rows = []
    for name, figures in one.items():
        row = [name]
        for found in (figures, two.get(name)):
            videos = found["videos_per_second"] if found else [0.0]
            row += [spread(videos, digits=0), f"{median(videos) * case.video_bytes / 1e9:.2f}"]
        cpu, peak = median(figures["cpu_seconds_per_video"]), median(figures["peak_bytes"])
        rows.append([*row, f"{cpu * 1e6:,.0f}", f"{peak / 2**20:,.0f}"])
    columns = ["reader", "videos/s, 1 core", "GB/s", "videos/s, 2 cores", "GB/s"]
    print_table([*columns, "CPU us a video, 1 core", "peak MiB, 1 core"], rows)
    ours = case.video_bytes / median(one[OURS]["cpu_seconds_per_video"])
    print(f"\n1 core copies {copied / 1e9:.1f} GB/s from memory to memory; {OURS} reads "
          f"{ours / 1e9:.1f} GB in a second of CPU time, {ours / copied:.0%} of that.",
          flush=True)  # fmt: skip


def report_collation(found: Found) -> None:
    """Print the table of collation."""
    print(f"\nCollation of {BATCH_SIZE} videos of 20 to 300 frames of 1,152 bytes, 1 core")
    rows = [
        [name, spread(figures["seconds"], unit=1e-3),
         f"{median(figures['allocated_bytes']) / 2**20:,.1f}"]
        for name, figures in found.items()
    ]  # fmt: skip
    print_table(["collation", "CPU ms a batch", "MiB allocated at most"], rows)


def ratios_of(title: str, found: Found, figure: str, *, is_speed: bool) -> dict[str, float]:
    """Return how many times better ours is than each peer."""
    ours = found[OURS][figure]
    return {
        f"{title}: {name}": ratio(*(ours, v[figure]) if is_speed else (v[figure], ours))
        for name, v in found.items()
    }


def main() -> None:
    """Run, and print tables or one object."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="the folder that the examples take")
    parser.add_argument("--tensorflow", metavar="PYTHON", help="a Python that has TensorFlow")
    parser.add_argument("--answer", action="store_true", help="not for people")
    options = parser.parse_args()
    if options.answer:
        return answer()
    installed, missing = versions(*PACKAGES)
    tensorflow = options.tensorflow or (None if "tensorflow-cpu" in missing else sys.executable)
    seconds, rounds = (QUICK_SECONDS, 1) if options.quick else (SECONDS, 3)
    cores = sorted(os.sched_getaffinity(0))[:2]
    about = f"{machine()}; {installed}"
    copied = copy_bandwidth()
    if not options.as_json:
        print(f"{about}; not installed here: {', '.join(missing) or 'nothing'}", flush=True)
    ratios, figures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases_of(options.data, Path(folder), is_quick=options.quick):
            one, two = (
                in_turn(readers_of(case, own, seconds, tensorflow, missing), rounds=rounds)
                if len(own) == count
                else {}
                for count, own in ((1, cores[:1]), (2, cores))
            )
            for cores_used, found in (("1 core", one), ("2 cores", two)):
                if found:
                    title = f"{case.title}, {cores_used}"
                    ratios |= ratios_of(title, found, "videos_per_second", is_speed=True)
                    figures[title] = found
            title = f"{case.title}, CPU time"
            ratios |= ratios_of(title, one, "cpu_seconds_per_video", is_speed=False)
            if not options.as_json:
                report(case, one, two, copied)
    work = {name: partial(alone, time_collation, name, seconds) for name in (OURS, BY_PAD)}
    figures["collation"] = collation = in_turn(work, rounds=rounds)
    ratios |= ratios_of("collation, CPU time", collation, "seconds", is_speed=False)
    if options.as_json:
        print_json(ratios=ratios, about=about, copy_bandwidth=copied, figures=figures)
    else:
        report_collation(collation)
    return None


if __name__ == "__main__":
    main()
