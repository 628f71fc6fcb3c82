"""Selection from predictions that keep few classes of many videos, within a bound of the memory.

    python benchmarks/selection_memory.py [--quick] [--json] [--folder FOLDER] [--memory SIZE]

50 candidates of 300,000 videos and 3,862 classes are made up, of which each file keeps 100 of every
video, 12 GB in all; the scores of the other classes are never made. ``select`` then chooses
greedily, as it does of so many candidates unless asked otherwise, in a fresh process. On the first
2,000 videos the members are compared with those that are chosen from files of every class.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from common import Figures, alone, machine, parser_of, print_json, print_table, versions

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.files import format_size, parse_size
from ensemble_kit.predictions.rows import TopRows
from ensemble_kit.predictions.writing import predictions_written, write_predictions

NUM_CLASSES, KEPT = 3862, 100
HEAD, NEAR = 100, 100  # classes that every video may be, and those that each has for itself
STEP = 2000  # videos that are made together
REST = np.float32(1e-6)  # the probability of every other class


class Case(NamedTuple):
    """How many videos and candidates."""

    num_videos: int
    num_candidates: int


class Scores:
    """Made-up probabilities of 200 classes of each video, the same whenever they are asked for.

    A logit is what its class is worth, more where it is a label (3 a video), noise that all
    candidates share and noise of the candidate's own; see ``selection.py``.
    """

    def __init__(self, num_videos: int) -> None:
        rng = np.random.default_rng(0)
        self.num_videos = num_videos
        self.starts = rng.integers(HEAD, NUM_CLASSES - NEAR, num_videos)
        self.columns = np.minimum(rng.zipf(1.3, (num_videos, 3)), HEAD + NEAR) - 1
        self.worth = (-0.35 * np.log(np.arange(HEAD + NEAR) / 10 + 1) - 6).astype(np.float32)

    @property
    def ids(self) -> list[str]:
        """The ids of all videos."""
        return [f"video-{number:06d}" for number in range(self.num_videos)]

    def classes(self, start: int, stop: int) -> np.ndarray:
        """Return the classes that some videos have scores of, ``(n, 200)``, ascending."""
        head = np.broadcast_to(np.arange(HEAD), (stop - start, HEAD))
        return np.concatenate([head, self.starts[start:stop, None] + np.arange(NEAR)], axis=1)

    def labels(self, start: int, stop: int) -> LabelLists:
        """Return the labels of some videos."""
        rows = np.take_along_axis(self.classes(start, stop), self.columns[start:stop], axis=1)
        return LabelLists.from_lists([sorted(set(row)) for row in rows.tolist()])

    def blocks(self, candidate: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield videos, their classes and a candidate's probabilities of them."""
        own = np.float32(0.8 + 0.2 * np.random.default_rng(candidate).random())
        for start in range(0, self.num_videos, STEP):
            stop = min(start + STEP, self.num_videos)
            shape = stop - start, HEAD + NEAR
            logits = np.random.default_rng((start, 0)).standard_normal(shape, np.float32)
            logits *= np.float32(1.5)
            noise = np.random.default_rng((start, 1 + candidate))
            logits += self.worth + own * noise.standard_normal(shape, np.float32)
            np.put_along_axis(
                logits,
                self.columns[start:stop],
                5 + np.take_along_axis(logits, self.columns[start:stop], axis=1),
                axis=1,
            )
            yield slice(start, stop), self.classes(start, stop), 1 / (1 + np.exp(-logits))


def write_best(folder: Path, case: Case) -> list[Path]:
    """Write files that keep the best classes of each video, and return them."""
    scores = Scores(case.num_videos)
    ids, labels = scores.ids, scores.labels(0, case.num_videos)
    paths = [folder / f"best-{number:02d}.safetensors" for number in range(case.num_candidates)]
    for number, path in enumerate(paths):
        print(f"writing {path.name} ...", file=sys.stderr)
        names = [f"class-{index}" for index in range(NUM_CLASSES)]
        with predictions_written(
            path, label_names=names, name=path.stem[-2:], model=None, top_k=KEPT, force=False
        ) as writer:
            for videos, classes, values in scores.blocks(number):
                order = np.argsort(-values, axis=1)[:, : KEPT + 1]
                best = np.take_along_axis(values, order, axis=1)
                kept = np.take_along_axis(classes, order[:, :KEPT], axis=1).astype(np.int32)
                source = TopRows(_Rows(best[:, :KEPT]), _Rows(kept), best[:, KEPT])
                writer.copy(
                    ids[videos],
                    labels.rows(videos.start, videos.stop),
                    source,
                    np.arange(len(values)),
                )
    return paths


class _Rows(SimpleNamespace):
    """Rows in memory, in place of those in a file."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__(rows=rows)

    def read(self, places: np.ndarray) -> np.ndarray:
        return self.rows[places]


def write_all(folder: Path, case: Case) -> list[Path]:
    """Write files of every class, and return them."""
    scores = Scores(case.num_videos)
    paths = [folder / f"all-{number:02d}.safetensors" for number in range(case.num_candidates)]
    for number, path in enumerate(paths):

        def rows(number: int = number) -> Iterator[np.ndarray]:
            for _, classes, values in scores.blocks(number):
                dense = np.full((len(values), NUM_CLASSES), REST)
                np.put_along_axis(dense, classes, values, axis=1)
                yield dense

        write_predictions(
            path,
            ids=scores.ids,
            label_names=[f"class-{index}" for index in range(NUM_CLASSES)],
            labels=scores.labels(0, case.num_videos),
            rows=rows(),
            name=path.stem[-2:],
            model=None,
            force=False,
        )
    return paths


def selected(paths: list[Path], memory: int) -> tuple[list[str], float]:
    """Return the members that are chosen, and the seconds that this takes."""
    from ensemble_kit.selection.stage import select

    with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
        start = time.perf_counter()
        selection = select(paths, output=Path(folder) / "selection.json", memory=memory)
        seconds = time.perf_counter() - start
    return [step.added for step in selection.path], seconds


def work(paths: list[Path], memory: int) -> Figures:
    members, seconds = selected(paths, memory)
    picks = {f"pick {place:02d}": float(name) for place, name in enumerate(members)}
    return {"seconds": seconds, **picks}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, help="where candidates are written")
    parser.add_argument("--memory", type=parse_size, default=parse_size("4GiB"), metavar="SIZE")
    options = parser.parse_args()
    case = Case(4000, 13) if options.quick else Case(300_000, 50)
    memory = 2**20 if options.quick else options.memory
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = write_best(Path(folder), case)
        size = sum(path.stat().st_size for path in paths)
        print(f"selecting of {format_size(size)} ...", file=sys.stderr)
        found = alone(work, paths, memory)
        for path in paths:
            path.unlink()
        small = case._replace(num_videos=2000)
        best = selected(write_best(Path(folder), small), memory)[0]
        dense = selected(write_all(Path(folder), small), memory)[0]
    picks = [int(value) for name, value in found.items() if name.startswith("pick")]
    about = f"{machine()}; {versions('numpy')[0]}"
    if options.as_json:
        print_json(ratios={}, about=about, figures=found, is_same=best == dense)
        return
    print(about)
    print_table(
        ["candidates x videos, classes kept", "files, GiB", "memory, GiB", "s", "peak, GiB"],
        [
            [
                f"{case.num_candidates} x {case.num_videos:,}, {KEPT} of {NUM_CLASSES:,}",
                f"{size / 2**30:.2f}",
                f"{memory / 2**30:.2f}",
                f"{found['seconds']:.1f}",
                f"{found['peak_bytes'] / 2**30:.2f}",
            ]
        ],
    )
    print(f"\nmembers: {picks}")
    same = "the same" if best == dense else f"not the same: {dense}"
    print(f"of the first 2,000 videos {best}; from every class {same}")


if __name__ == "__main__":
    main()
