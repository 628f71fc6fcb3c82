"""Whether calibrating members before they are mixed raises GAP.

    python benchmarks/calibrated_members.py PREDICTIONS PREDICTIONS... [--seeds 3]

Half of the videos, drawn by a seed, fit each member's calibration; GAP@20 and macro mAP are
measured on the other half: of the mean of the members as they are, and of the mean of the
calibrated ones. The mean that is calibrated as a whole stands beside them, which says how much is
due to the mixing.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.calibration.counts import Counts
from ensemble_kit.calibration.fitting import METHODS
from ensemble_kit.choices import DTYPE
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.metrics import global_average_precision
from ensemble_kit.predictions.candidates import read_candidates
from ensemble_kit.predictions.videos import taken
from ensemble_kit.ranking_metrics import measure_rankings
from ensemble_kit.serving.calibration import Calibration

Matrix = NDArray[np.float64]
NONE = np.zeros(0)


def fitted(method: str, rows: Matrix, labels: LabelLists) -> Callable[[Matrix], Matrix]:
    """Return what calibrates probabilities ``(n, C)`` by a fit on some."""
    counts = Counts.empty(rows.shape[1])
    counts.add(rows, labels)
    curve = METHODS[method](counts)
    calibration = Calibration(method, curve.knots, curve.values, NONE, NONE, NONE, {})
    return lambda given: calibration.calibrated(given).astype(np.float64)


def scores(rows: Matrix, labels: LabelLists) -> tuple[float, float]:
    """Return GAP@20 and macro mAP."""
    macro = measure_rankings(lambda: [(rows, labels)], rows.shape[1]).macro_map
    return global_average_precision(rows, labels), macro


def measured(
    members: Sequence[Matrix], labels: LabelLists, seed: int
) -> dict[str, tuple[float, float]]:
    """Return the scores of each way of mixing on the half that nothing was fitted on."""
    order = np.random.default_rng(seed).permutation(len(members[0]))
    fit, test = np.sort(order[::2]), np.sort(order[1::2])
    own, other = taken(labels, fit), taken(labels, test)
    mean = np.mean(members, axis=0)
    found = {"as they are": scores(mean[test], other)}
    for method in METHODS:
        if method == "none":
            continue
        calibrated = [fitted(method, rows[fit], own)(rows[test]) for rows in members]
        found[f"each by {method}"] = scores(np.mean(calibrated, axis=0), other)
        whole = fitted(method, mean[fit], own)(mean[test])
        found[f"the mean by {method}"] = scores(whole, other)
    return found


def main() -> None:
    """Print a table: a line for each way, and what it changes on each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("predictions", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    known = read_candidates(
        arguments.predictions, labels_path=None, dtypes=[DTYPE], sizes={}, has_limit=False
    )
    videos = np.arange(len(known.ids))
    members = [each.taken(videos).astype(np.float64) for each in known.candidates]
    rounds = [measured(members, known.labels, seed) for seed in range(arguments.seeds)]
    names = ", ".join(each.name for each in known.candidates)
    print(f"{len(videos):,} videos, mean of {names}; half of the videos are measured on")
    for place, metric in enumerate(("GAP@20", "macro mAP")):
        print(f"\n{metric:<24}" + "".join(f"  seed {seed:<9}" for seed in range(len(rounds))))
        for way in rounds[0]:
            cells = (
                f"  {found[way][place]:.4f} {found[way][place] - found['as they are'][place]:+.4f}"
                for found in rounds
            )
            print(f"{way:<24}" + "".join(cells))


if __name__ == "__main__":
    main()
