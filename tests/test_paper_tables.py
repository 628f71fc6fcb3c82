"""The comparison with published tables, on a few of the real records."""

import json
import sys
from importlib import util
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from test_examples import few_records

from ensemble_kit.recipes.reading import load_recipe

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "paper_tables.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module; its dataclasses look it up among the imported ones."""
    spec = util.spec_from_file_location("paper_tables", SCRIPT)
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "paper_tables", module)
    spec.loader.exec_module(module)
    return module


def test_the_rows_are_those_of_the_papers_and_carry_their_figures(script):
    s1, s2 = script.TABLES

    assert [load_recipe(row.recipe).reported.gap_at_20 for row in s1.rows] == [
        0.381, 0.696, 0.742, 0.818, 0.833,
    ]  # fmt: skip
    assert [load_recipe(row.recipe).reported.gap_at_20 for row in s2.rows] == [
        0.714, 0.741, 0.817, 0.820, 0.816, 0.822, 0.823, 0.824, 0.820, 0.830, 0.831, 0.832,
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["S1", "S2"])
def test_every_row_of_a_table_sees_the_same_videos(script, key):
    (table,) = [table for table in script.TABLES if table.key == key]

    budgets = {
        (recipe.training.batch_size, recipe.training.max_steps)
        for recipe in (load_recipe(r.recipe, (*table.schedule, *r.overrides)) for r in table.rows)
    }

    assert len(budgets) == 1


def test_tau_counts_agreeing_less_disagreeing_pairs(script):
    assert script.kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert script.kendall_tau([4, 3, 2, 1], [10, 20, 30, 40]) == -1
    assert script.kendall_tau([1, 3, 2], [1, 2, 3]) == pytest.approx(1 / 3)
    # one of the six pairs is tied in the paper: 5 agree, of sqrt(6 * 5)
    assert script.kendall_tau([1, 2, 3, 4], [1, 2, 2, 4]) == pytest.approx(5 / 30**0.5)


def test_the_share_of_orders_that_agree_as_well_is_that_of_all_orders(script):
    paper = [1.0, 2.0, 3.0, 4.0]
    gaps = np.array([[0.1, 0.1], [0.2, 0.2], [0.4, 0.4], [0.3, 0.3]])  # tau is 4 / 6

    (low, high), share = script.uncertainty(gaps, paper)

    taus = [script.kendall_tau(order, paper) for order in permutations(paper)]
    exact = sum(tau >= 4 / 6 - 1e-12 for tau in taus) / len(taus)
    assert low == high == pytest.approx(4 / 6)  # seeds that agree leave nothing to redraw
    assert share == pytest.approx(exact, abs=0.02)  # five deviations of 10,000 draws


def test_noise_between_seeds_widens_the_interval(script):
    gaps = np.array([[0.1, 0.5], [0.2, 0.4], [0.6, 0.1]])

    (low, high), _ = script.uncertainty(gaps, [1.0, 2.0, 3.0])

    assert low < high


@pytest.mark.realdata
def test_a_comparison_that_was_stopped_trains_only_what_is_left(
    script, real_data, tmp_path, monkeypatch, runner
):
    few_records(real_data / "audioset/frame", tmp_path / "data/audioset/frame", shards=8)
    names = "audioset/class_labels_indices.csv"
    (tmp_path / "data" / names).symlink_to(real_data / names)
    table = script.TABLES[1]
    small = script.Table(**{**vars(table), "rows": table.rows[:2]})
    monkeypatch.setattr(script, "TABLES", (small,))
    monkeypatch.setattr(script, "plot", lambda results, path: None)
    (tmp_path / "out" / "results").mkdir(parents=True)
    quick = ("training.max_steps=2", "training.checkpoint_every=1")
    for row, seed in ((small.rows[0], 0), (small.rows[1], 0), (small.rows[0], 1)):
        recipe = load_recipe(row.recipe, (*small.schedule, *row.overrides, *quick))
        settings = script.settings_of(recipe)
        done = script.Result("S2", row.name, seed, settings, 0.25 + seed / 2, 1.0, 7)
        path = tmp_path / "out" / "results" / f"S2-{row.name}-{seed}.json"
        path.write_text(json.dumps(vars(done)))
    arguments = [str(tmp_path / "data"), str(tmp_path / "out"), "--quick"]

    result = runner.invoke(script.main, arguments, catch_exceptions=False)

    assert result.exit_code == 0
    assert [line.split(": GAP")[0] for line in result.stderr.splitlines() if "GAP@20" in line] == [
        "S2 average-moe-cg seed 1"
    ]
    path = tmp_path / "out" / "results" / "S2-average-moe-cg-1.json"
    assert 0 < json.loads(path.read_text())["gap"] < 1
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[4].startswith("| average-logistic | 0.5000 | 0.3536 | ")  # of 0.25 and 0.75
    assert lines[5].startswith("| average-moe-cg | ")


def test_a_plot_names_every_row(script, tmp_path):
    results = [
        script.Result(table.key, row.name, seed, "", 0.5 + 0.01 * index + 0.002 * seed, 1.0, 7)
        for table in script.TABLES
        for index, row in enumerate(table.rows)
        for seed in range(3)
    ]

    script.plot(results, tmp_path / "plot.svg")

    drawn = (tmp_path / "plot.svg").read_text()
    assert "<!-- gated-net-vlad  0.832 -->" in drawn  # on the paper's side
    assert "<!-- 0.6120 ± 0.0020  gated-net-vlad -->" in drawn  # the twelfth row, 0.61 + 0.002 seed
