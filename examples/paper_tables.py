"""Two published tables, trained again on real records and set beside the papers' figures.

    python examples/paper_tables.py DATA OUT [--quick] [--jobs N]

S1 (arXiv:1809.05848), table 1: five fusions of average-pooled rgb and audio, on the YouTube-8M
video-level records DATA/yt8m/video. S2 (arXiv:1706.06905), table 1: twelve ways to pool frames, on
the AudioSet records DATA/audioset/frame. Every row of a table sees the same number of videos, three
times from different seeds; sizes are scaled down together and learning rates up, as `TABLES` says.
The papers' GAP comes from the recipes. OUT gets `results/*.json`, `table.md` and `plot.svg`.

Each run is one `ensemble-kit train` on one thread. Ctrl-C stops the script, and the same command
resumes it.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.dataset import Records
from ensemble_kit.files import written_aside
from ensemble_kit.networks.building import measure_recipe
from ensemble_kit.recipes.reading import Recipe, load_recipe

COMMAND = (sys.executable, "-c", "from ensemble_kit.cli import main; main()")
DRAWS = 10_000


@dataclass(frozen=True)
class Row:
    """One row of a table: a recipe and what is set over it."""

    recipe: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """The row's name: the recipe's without its folder."""
        return self.recipe.partition("/")[2]


@dataclass(frozen=True)
class Table:
    """A published table.

    Attributes:
        key: The short name of paper and table.
        title: What it compares, and on which records.
        records: The folder of train, validate and test records, in DATA.
        names: The CSV file of class names, in DATA.
        schedule: Set over every row, so that all have the same budget.
        rows: In the paper's order.
    """

    key: str
    title: str
    records: str
    names: str
    schedule: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Result:
    """One finished run: GAP@20 on the test records, and the CPU seconds of its training."""

    table: str
    row: str
    seed: int
    settings: str
    gap: float
    seconds: float
    parameters: int


def _row(recipe: str, learning_rate: str, *overrides: str) -> Row:
    return Row(recipe, (f"training.learning_rate={learning_rate}", *overrides))


_VLAD = ("pooling.num_clusters=32", "hidden.size=512")
_FV = ("pooling.num_clusters=16", "hidden.size=512")
_BAG = ("pooling.num_clusters=512", "hidden.size=512")

TABLES = (
    Table(
        key="S1",
        title="S1, table 1: average pooling, YouTube-8M video level",
        records="yt8m/video",
        names="yt8m/label_names_2018.csv",
        schedule=(
            "training.batch_size=256",
            "training.max_steps=200",
            "training.checkpoint_every=200",
            "training.learning_rate_decay=0.8",
            "training.examples_per_decay=8_000",
            "training.batch_norm_momentum=0.02",
            "training.average_last=1",
        ),
        rows=(
            _row("mfb/average-audio", "0.04"),
            _row("mfb/average-rgb", "0.04"),
            _row("mfb/average-concat", "0.04"),
            # projections of 1,000 in place of 5,000, in both: the paper's "same parameter settings"
            _row("mfb/average-fc-concat", "0.005", "fusion.size=1000"),
            _row("mfb/average-mfb", "0.06", "fusion.size=500", "fusion.factors=2"),
        ),
    ),
    Table(
        key="S2",
        title="S2, table 1: pooling of frames, AudioSet",
        records="audioset/frame",
        names="audioset/class_labels_indices.csv",
        schedule=(
            "training.batch_size=128",
            "training.max_steps=450",
            "training.checkpoint_every=90",
            "training.learning_rate_decay=0.8",
            "training.examples_per_decay=10_000",
            "training.batch_norm_momentum=0.02",
            "training.average_last=2",
        ),
        rows=(
            _row("willow/average-logistic", "0.03"),
            _row("willow/average-moe-cg", "0.01"),
            _row("willow/lstm", "0.002", "pooling.hidden_size=256"),
            _row("willow/gru", "0.002", "pooling.hidden_size=256"),
            _row("willow/bow", "0.003", *_BAG),
            _row("willow/net-fv", "0.002", *_FV),
            _row("willow/net-rvlad", "0.002", *_VLAD),
            _row("willow/net-vlad", "0.002", *_VLAD),
            _row("willow/gated-bow", "0.003", *_BAG, "pooling.gate_rank=128"),
            _row("willow/gated-net-fv", "0.002", *_FV),
            _row("willow/gated-net-rvlad", "0.002", *_VLAD),
            _row("willow/gated-net-vlad", "0.002", *_VLAD),
        ),
    ),
)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="Two steps a run and two seeds: only try it out.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True,
    help="Runs at a time, of one thread each.",
)  # fmt: skip
def main(data: Path, out: Path, quick: bool, jobs: int) -> None:
    """Train the rows of two published tables on the records in DATA and compare, in OUT."""
    out.mkdir(parents=True, exist_ok=True)
    done = {(r.table, r.row, r.seed, r.settings): r for r in read_results(out)}
    extra = ("training.max_steps=2", "training.checkpoint_every=1") if quick else ()
    wanted, left = [], []
    for seed in range(2 if quick else 3):  # all rows of a seed first: a table as soon as can be
        for table in TABLES:
            for row in table.rows:
                recipe = load_recipe(row.recipe, (*table.schedule, *row.overrides, *extra))
                wanted.append((table.key, row.name, seed, settings_of(recipe)))
                if wanted[-1] not in done:
                    left.append(Run(table, row, recipe, seed))
    train_all(left, data, out, jobs)
    results = [r for r in read_results(out) if (r.table, r.row, r.seed, r.settings) in wanted]
    text = "\n\n".join(describe(table, results) for table in TABLES) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    plot(results, out / "plot.svg")
    click.echo(text)


@dataclass(frozen=True)
class Run:
    """A run to do."""

    table: Table
    row: Row
    recipe: Recipe
    seed: int

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.table.key}-{self.row.name}-{self.seed}"


def read_results(out: Path) -> list[Result]:
    """Return the finished runs."""
    paths = sorted((out / "results").glob("*.json"))
    return [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def settings_of(recipe: Recipe) -> str:
    """Return a hash of a recipe with its values: a result is used again only for the same."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def train_all(runs: Sequence[Run], data: Path, out: Path, jobs: int) -> None:
    """Do runs side by side; each that ends leaves its result in its own file."""
    with ThreadPoolExecutor(jobs) as pool:

        def work(run: Run) -> None:
            result = train_one(run, data, out)
            path = out / "results" / f"{run.name}.json"
            with written_aside(path, force=True) as aside:
                aside.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
            click.echo(
                f"{result.table} {result.row} seed {result.seed}: "
                f"GAP@20 {result.gap:.4f}, {result.seconds:.0f} s",
                err=True,
            )

        futures = [pool.submit(work, run) for run in runs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train_one(run: Run, data: Path, out: Path) -> Result:
    """Train one row from one seed and score its averaged checkpoint on the test records."""
    records, names = data / run.table.records, data / run.table.names
    sets = [word for value in run.recipe.metadata.overrides for word in ("--set", value)]
    seconds = call(
        "train", run.row.recipe, "--name", run.name, "-o", out / "runs", "--force",
        "--seed", run.seed, "--train", records / "train", "--validation", records / "validate",
        "--label-names", names, *sets,
    )[1]  # fmt: skip
    model = out / "runs" / run.name / "averaged.safetensors"
    printed, _ = call("evaluate", model, records / "test", "--label-names", names, "--json")
    schema = Records([records / "train"]).schema
    return Result(
        table=run.table.key,
        row=run.row.name,
        seed=run.seed,
        settings=settings_of(run.recipe),
        gap=json.loads(printed)["gap"],
        seconds=round(seconds, 1),
        parameters=measure_recipe(run.recipe, schema).parameters,
    )


def call(*words: object) -> tuple[str, float]:
    """Run an ``ensemble-kit`` command on one thread; return what it printed and its CPU seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [*COMMAND, *map(str, words)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        errors: list[str] = []
        drain = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        drain.start()
        printed = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        drain.join()
    if process.returncode:
        raise click.ClickException(f"{' '.join(command[3:])}\n{''.join(errors)}")
    return printed, usage.ru_utime + usage.ru_stime


def kendall_tau(here: Sequence[float], paper: Sequence[float]) -> float:
    """Return Kendall's tau-b: agreeing less disagreeing pairs, corrected for ties; in [-1, 1]."""
    signs = [
        (np.sign(here[i] - here[j]), np.sign(paper[i] - paper[j]))
        for i, j in combinations(range(len(here)), 2)
    ]
    ours, theirs = np.array(signs).T
    return float((ours * theirs).sum() / np.sqrt(np.abs(ours).sum() * np.abs(theirs).sum()))


def uncertainty(
    gaps: NDArray[np.float64], paper: Sequence[float]
) -> tuple[tuple[float, float], float]:
    """Return how far tau can be trusted.

    Args:
        gaps: ``(rows, seeds)``.
        paper: The paper's GAP of each row.

    Returns:
        The middle 90 % of tau when every row's mean is redrawn from a normal distribution whose
        deviation is that of the seeds, pooled over rows, over the root of their number; and the
        share of random orders of the rows that agree with the paper at least as well as ours.
    """
    random = np.random.default_rng(0)
    means = gaps.mean(axis=1)
    error = np.sqrt(gaps.var(axis=1, ddof=1).mean() / gaps.shape[1])
    redrawn = [kendall_tau(random.normal(means, error), paper) for _ in range(DRAWS // 10)]
    tau = kendall_tau(means.tolist(), paper)
    orders = [kendall_tau(random.permutation(means).tolist(), paper) for _ in range(DRAWS)]
    low, high = np.quantile(redrawn, (0.05, 0.95))
    return (float(low), float(high)), float(np.mean([other >= tau - 1e-12 for other in orders]))


def gaps_of(table: Table, results: Sequence[Result]) -> tuple[NDArray[np.float64], list[float]]:
    """Return the GAPs here, ``(rows, seeds)``, and the paper's, in the table's order."""
    here = [
        [r.gap for r in results if r.table == table.key and r.row == row.name] for row in table.rows
    ]
    reported = [load_recipe(row.recipe).reported for row in table.rows]
    return np.array(here), [one.gap_at_20 or 0.0 for one in reported if one is not None]


def describe(table: Table, results: Sequence[Result]) -> str:
    """Return a table in Markdown: here and paper side by side, and how well the orders agree."""
    here, paper = gaps_of(table, results)
    means = here.mean(axis=1)
    lines = [
        f"### {table.title}",
        "",
        "| row | GAP@20 here | ± | rank | GAP@20 in the paper | rank | parameters | CPU s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ranks = [rank_of(means.tolist()), rank_of(paper)]
    for index, row in enumerate(table.rows):
        own = [r for r in results if r.table == table.key and r.row == row.name]
        seconds = np.mean([r.seconds for r in own])
        lines.append(
            f"| {row.name} | {means[index]:.4f} | {here[index].std(ddof=1):.4f} | "
            f"{ranks[0](index)} | {paper[index]:.3f} | {ranks[1](index)} | "
            f"{own[0].parameters:,} | {seconds:.0f} |"
        )
    (low, high), share = uncertainty(here, paper)
    tau = kendall_tau(means.tolist(), paper)
    as_well = f"{share:.2%}" if share else "none"
    lines += [
        "",
        f"{here.shape[1]} seeds; ± is their standard deviation. Kendall's tau of the two orders is "
        f"{tau:.2f} ({low:.2f} to {high:.2f} when the seeds' noise is redrawn). Of {DRAWS:,} "
        f"random orders {as_well} agree as well.",
    ]
    return "\n".join(lines)


def rank_of(values: Sequence[float]) -> Callable[[int], int]:
    """Return a function from an index to its rank, 1 for the largest; equal values share one."""
    return lambda index: 1 + sum(value > values[index] for value in values)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the paper's order beside the order here, one panel a table, a line for each row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("No plot: matplotlib is not installed (pip install '.[plots]').", err=True)
        return
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axis, table in zip(figure.subplots(1, len(TABLES)), TABLES, strict=True):
        here, paper = gaps_of(table, results)
        means, errors = here.mean(axis=1), here.std(axis=1, ddof=1)
        left, right = np.argsort(np.argsort(paper)), np.argsort(np.argsort(means))
        for index, row in enumerate(table.rows):
            ends = [left[index], right[index]]
            axis.plot([0, 1], ends, "-o", color="C0" if ends[0] == ends[1] else "C1")
            axis.text(-0.04, ends[0], f"{row.name}  {paper[index]:.3f}", ha="right", va="center")
            found = f"{means[index]:.4f} ± {errors[index]:.4f}  {row.name}"
            axis.text(1.04, ends[1], found, ha="left", va="center")
        axis.set_title(f"{table.title}\nGAP@20 in the paper, and here", fontsize=10)
        axis.set_xlim(-1.3, 2.5)
        axis.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    main()
