"""Greedy selection by GAP@20 beside AutoGluon's and a dense one, on the same candidates.

    python benchmarks/selection.py [--quick] [--json] [--peer-python PYTHON] [--peer-additions 25]

Candidates are made for it: singles near 0.80, their mean near 0.87, in files of 300 MB each. All
three add 25 of 25 candidates greedily, with replacement, and keep the best prefix, as AutoGluon
does. It and the dense one are given the kit's own GAP@20; AutoGluon is given a plain one too, as a
user would write it. They do as many additions as ``--peer-additions`` says, and the time of the
rest is extrapolated from the time of an evaluation. Reading the files counts. Everybody works in
their own process. ``--peer-python`` names another Python that has autogluon.core, where this one
has not.

A second table shows how the kit's time and memory grow, with videos and with candidates; its files
take 19 GB at most, in a temporary folder or in ``--folder``.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from common import (
    Figures,
    alone,
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

K = 20
NUM_CLASSES = 3862
ROUNDS = 3
STEP = 500  # videos that are made together
GIB = 1 << 30


class Case(NamedTuple):
    """How many videos, candidates and additions."""

    num_videos: int
    num_candidates: int
    num_additions: int

    @property
    def num_evaluations(self) -> int:
        """Ensembles that are measured."""
        return self.num_candidates * self.num_additions

    @property
    def title(self) -> str:
        """Candidates x videos x classes."""
        return f"{self.num_candidates} x {self.num_videos:,} x {NUM_CLASSES:,}"


# --- the candidates


class Scores:
    """Made-up probabilities of some candidates, the same whenever they are asked for.

    A logit is what its class is worth (Zipf's law), more where the class is a label (about 3 a
    video, by the same law), noise that all candidates share, so that no ensemble is perfect, and
    noise of the candidate's own, which a mean removes; some have more of it than others. Noise is
    read from random places of one pool: drawing it would take minutes.
    """

    def __init__(self, num_videos: int) -> None:
        rng = np.random.default_rng(0)
        self.num_videos = num_videos
        frequency = 1 / (np.arange(NUM_CLASSES) + 10)
        self.worth = (0.35 * np.log(frequency / frequency[0]) - 8).astype(np.float32)
        self.noise = np.lib.stride_tricks.sliding_window_view(
            rng.standard_normal(2**24, dtype=np.float32), NUM_CLASSES
        )
        counts = 1 + rng.poisson(2, num_videos)
        shares = frequency / frequency.sum()
        self.labels = [np.unique(rng.choice(NUM_CLASSES, size=count, p=shares)) for count in counts]
        self.strength = 7.65 * (1 + 0.3 * rng.standard_normal(num_videos, dtype=np.float32))

    def blocks(self, candidate: int) -> Iterator[np.ndarray]:
        """Yield the probabilities of a candidate, ``(STEP, C)`` at a time."""
        own_noise = np.float32(0.8 + 0.2 * np.random.default_rng(candidate).random())
        for start in range(0, self.num_videos, STEP):
            stop = min(start + STEP, self.num_videos)
            logits = self.worth + self._noise(start, stop, 0) * np.float32(1.5)
            logits += own_noise * self._noise(start, stop, 1 + candidate)
            for row, video in enumerate(range(start, stop)):
                logits[row, self.labels[video]] += self.strength[video]
            yield 1 / (1 + np.exp(-logits))

    def _noise(self, start: int, stop: int, stream: int) -> np.ndarray:
        rng = np.random.default_rng((start, stream))
        return self.noise[rng.integers(0, len(self.noise), stop - start)]


def write_candidates(folder: Path, case: Case) -> list[Path]:
    """Write the candidates of a case as predictions files of the kit, and return them."""
    from ensemble_kit.data.labels import LabelLists
    from ensemble_kit.predictions.writing import write_predictions

    scores = Scores(case.num_videos)
    labels = LabelLists.from_lists(scores.labels)
    paths = [
        folder / f"candidate-{number:02d}.safetensors" for number in range(case.num_candidates)
    ]
    for number, path in enumerate(paths):
        print(f"writing {path.name}, {case.title} ...", file=sys.stderr)
        write_predictions(
            path,
            ids=[f"video-{video:06d}" for video in range(case.num_videos)],
            label_names=[f"class-{index}" for index in range(NUM_CLASSES)],
            labels=labels,
            rows=scores.blocks(number),
            name=path.stem,
            model=None,
            force=False,
        )
    return paths


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Read a tensor with NumPy alone, as the peer's Python may lack the libraries of ours."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        spec = json.loads(file.read(size))[name]
        dtype = {"F32": np.float32, "I64": np.int64}[spec["dtype"]]
        count = int(np.prod(spec["shape"]))
        offset = spec["data_offsets"][0]
        file.seek(8 + size + offset)
        return np.fromfile(file, dtype, count).reshape(spec["shape"])


def read_dense(paths: Sequence[Path]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return every candidate's probabilities and the labels, ``(N, C)`` each."""
    from ensemble_kit.data.labels import LabelLists

    offsets, classes = (read_tensor(paths[0], name) for name in ("label_offsets", "label_classes"))
    labels = LabelLists(offsets, classes).dense(NUM_CLASSES)
    return [read_tensor(path, "probabilities") for path in paths], labels


# --- the three ways; each returns seconds of preparation, seconds of an evaluation, and its picks


def select_ours(paths: Sequence[Path], case: Case) -> Figures:
    from ensemble_kit.predictions.candidates import read_candidates
    from ensemble_kit.selection.scoring import Scorer
    from ensemble_kit.selection.search import Rules, Search
    from ensemble_kit.selection.table import read_tables

    start = time.perf_counter()
    known = read_candidates(paths, labels_path=None, dtypes=("bf16",), sizes={}, has_limit=False)
    (table,) = read_tables(known, [np.ones(case.num_videos, np.bool_)], k=K)
    prepared = time.perf_counter()
    rules = Rules(
        strategy="replacement",
        criterion="gain",
        limit=GIB,
        max_members=case.num_additions,
        beam_width=1,
        start=(),
    )
    search = Search(Scorer(table, K), known.candidates, [1.0] * case.num_candidates, rules)
    best = search.run()
    seconds = time.perf_counter() - prepared
    return _figures(prepared - start, seconds, case.num_additions, case, best.members, best.score)


def select_dense(paths: Sequence[Path], case: Case, num_additions: int) -> Figures:
    """The plain way: the mean of all members so far and each candidate, and its GAP."""
    start = time.perf_counter()
    candidates, labels = read_dense(paths)
    prepared = time.perf_counter()
    total = np.zeros(labels.shape)
    picks, best_gaps = [], []
    for _ in range(num_additions):
        gaps = [kit_gap(labels, total + one) for one in candidates]
        picks.append(int(np.argmax(gaps)))
        best_gaps.append(max(gaps))
        total += candidates[picks[-1]]
    seconds = time.perf_counter() - prepared
    best = int(np.argmax(best_gaps))
    return _figures(
        prepared - start, seconds, num_additions, case, picks[: best + 1], best_gaps[best]
    )


def plain_gap(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    """GAP@20 as one would write it with NumPy; tied scores rank as they come."""
    classes = np.argpartition(y_pred, -K, axis=1)[:, -K:]
    scores = np.take_along_axis(y_pred, classes, axis=1).ravel()
    hits = np.take_along_axis(y_true, classes, axis=1).ravel()
    ranks = np.flatnonzero(hits[np.argsort(-scores)]) + 1
    return (np.arange(1, len(ranks) + 1) / ranks).sum() / np.count_nonzero(y_true)


def kit_gap(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    from ensemble_kit.metrics import global_average_precision

    return global_average_precision(y_pred, y_true, k=K)


GAPS = {"the kit's GAP": kit_gap, "a plain GAP": plain_gap}


def select_autogluon(
    paths: Sequence[Path], case: Case, num_additions: int, gap_name: str
) -> Figures:
    from autogluon.core.metrics import make_scorer
    from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection

    gap = GAPS[gap_name]
    metric = make_scorer("gap_at_20", gap, optimum=1, greater_is_better=True, needs_proba=True)
    start = time.perf_counter()
    candidates, labels = read_dense(paths)
    prepared = time.perf_counter()
    selection = EnsembleSelection(num_additions, "binary", metric)  # the type that rescales nothing
    selection.fit(candidates, labels)
    seconds = time.perf_counter() - prepared
    best = 1 - float(selection.train_score_)
    return _figures(prepared - start, seconds, num_additions, case, selection.indices_, best)


def _figures(
    preparation: float,
    seconds: float,
    num_additions: int,
    case: Case,
    picks: Sequence[int],
    gap: float,
) -> Figures:
    evaluation = seconds / (num_additions * case.num_candidates)
    return {
        "preparation": preparation,
        "evaluation": evaluation,
        "whole": preparation + evaluation * case.num_evaluations,
        "gap": gap,
        **{f"pick {place:02d}": float(one) for place, one in enumerate(picks)},
    }


def picks_of(figures: dict[str, list[float]]) -> list[int]:
    return [int(values[0]) for name, values in figures.items() if name.startswith("pick ")]


# --- AutoGluon in another Python


def elsewhere(
    python: str, paths: Sequence[Path], case: Case, num_additions: int, gap_name: str
) -> Figures:
    """Call ``select_autogluon`` in another Python, in a fresh process of it."""
    root = Path(__file__).resolve().parents[1]
    call = [list(map(str, paths)), list(case), num_additions, gap_name]
    result = subprocess.run(
        [python, __file__, "--as-peer", json.dumps(call)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def as_peer(text: str) -> None:
    paths, case, *rest = json.loads(text)
    figures = select_autogluon([Path(path) for path in paths], Case(*case), *rest)
    print(json.dumps({**figures, "peak_bytes": peak_bytes()}))


def peer_version(python: str) -> str | None:
    """Return ``autogluon.core 1.6.3`` as a Python has it; None where it has not."""
    code = "import importlib.metadata as m; print(m.version('autogluon.core'))"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return f"autogluon.core {result.stdout.strip()}" if result.returncode == 0 else None


# --- the tables


def compare(case: Case, folder: Path, python: str, num_additions: int, rounds: int) -> Any:
    paths = write_candidates(folder, case)
    work: dict[str, Callable[[], Figures]] = {
        "ensemble-kit": partial(alone, select_ours, paths, case),
        "dense NumPy": partial(alone, select_dense, paths, case, num_additions),
    }
    if peer_version(python) is not None:
        for name in GAPS:
            call = partial(elsewhere, python, paths, case, num_additions, name)
            work[f"AutoGluon, {name}"] = call
    found = in_turn(work, rounds=rounds)
    for path in paths:
        path.unlink()
    return found


def print_comparison(found: Any, case: Case, num_additions: int) -> None:
    is_whole = num_additions == case.num_additions
    print_table(
        [
            f"{case.title}, {case.num_additions} additions",
            "preparation, s",
            "an evaluation, s",
            f"{case.num_evaluations} and preparation, s",
            "peak, GiB",
            "GAP",
        ],
        [
            [
                name + ("" if name == "ensemble-kit" or is_whole else ", extrapolated"),
                spread(figures["preparation"], digits=1),
                spread(figures["evaluation"], digits=4),
                spread(figures["whole"], digits=1),
                spread(figures["peak_bytes"], unit=GIB),
                f"{figures['gap'][0]:.6f}",
            ]
            for name, figures in found.items()
        ],
    )
    ours = picks_of(found["ensemble-kit"])
    for name, figures in found.items():
        theirs = picks_of(figures)
        count = next(
            (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1),
            None,
        )
        same = "the same as ours" if count is None else f"unlike ours from pick {count + 1} on"
        print(f"\n{name} picked {len(theirs)}: {theirs}, {same}")


def grow(cases: Sequence[Case], folder: Path) -> list[tuple[Case, Figures, float]]:
    rows = []
    for case in cases:
        paths = write_candidates(folder, case)
        size = sum(path.stat().st_size for path in paths)
        print(f"selecting, {case.title} ...", file=sys.stderr)
        rows.append((case, alone(select_ours, paths, case), size))
        for path in paths:
            path.unlink()
    return rows


def print_growth(rows: Sequence[tuple[Case, Figures, float]]) -> None:
    print_table(
        ["candidates x videos x classes", "files, GiB", "preparation, s", "an evaluation, s",
         "evaluations", "whole, s", "peak, GiB"],
        [
            [
                case.title,
                f"{size / GIB:.2f}",
                f"{figures['preparation']:.1f}",
                f"{figures['evaluation']:.4f}",
                f"{case.num_evaluations:,}",
                f"{figures['whole']:.1f}",
                f"{figures['peak_bytes'] / GIB:.2f}",
            ]
            for case, figures, size in rows
        ],
    )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--as-peer"]:
        as_peer(sys.argv[2])
        return
    parser = parser_of(__doc__)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--peer-additions", type=int, default=2, metavar="N")
    parser.add_argument("--folder", type=Path, help="where candidates are written")
    arguments = parser.parse_args()
    print(machine(), file=sys.stderr)
    case = Case(1000, 6, 8) if arguments.quick else Case(20_000, 25, 25)
    sizes = (
        [(1000, 6), (2000, 6), (1000, 12)]
        if arguments.quick
        else [(20_000, 12), (50_000, 12), (100_000, 12), (20_000, 25), (20_000, 50)]
    )
    num_additions = case.num_additions if arguments.quick else arguments.peer_additions
    peer = peer_version(arguments.peer_python)
    if peer is None:
        print(f"{arguments.peer_python} has no autogluon.core: it is left out.", file=sys.stderr)
    rounds = 1 if arguments.quick else ROUNDS
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = compare(case, Path(folder), arguments.peer_python, num_additions, rounds)
        growth = grow([Case(*size, case.num_additions) for size in sizes], Path(folder))
    ours = found["ensemble-kit"]
    if arguments.as_json:
        print_json(
            ratios={
                name: ratio(figures["whole"], ours["whole"])
                for name, figures in found.items()
                if figures is not ours
            },
            seconds={name: median(figures["whole"]) for name, figures in found.items()},
            peak_bytes={name: max(figures["peak_bytes"]) for name, figures in found.items()},
            picks={name: picks_of(figures) for name, figures in found.items()},
            peer_additions=num_additions,
            growth=[
                {"num_videos": one.num_videos, "num_candidates": one.num_candidates,
                 "seconds": figures["whole"], "peak_bytes": figures["peak_bytes"]}
                for one, figures, _ in growth
            ],
        )  # fmt: skip
        return
    print(f"{machine()}; {versions('numpy')[0]}{f', {peer}' if peer else ''}")
    print_comparison(found, case, num_additions)
    print_growth(growth)


if __name__ == "__main__":
    main()
