import json
import tomllib
from pathlib import Path

import pytest
from builders import tiny_recipe_text

from ensemble_kit.errors import RecipeError
from ensemble_kit.recipes import reading
from ensemble_kit.recipes.ensembles import (
    ensembles_json_schema,
    load_ensemble,
    load_ensembles,
    parse_ensembles,
)
from ensemble_kit.recipes.reading import recipe_names

MODELS = Path(__file__).resolve().parents[2] / "models"
TEXT = """\
[source]
paper = "A paper"

[ensembles.pair]
title = "Two"
members = ["a/one", "a/two"]
mixing = "uniform"

[[ensembles.pair.reported]]
gap_at_20 = 0.5
split = "test"
"""
TABLE_KEYS = "title, members, mixing, num_members, file_mib, reported"


def message_of(text):
    with pytest.raises(RecipeError) as caught:
        parse_ensembles("a/ensembles.toml", text, ["a/one", "a/two"])
    return str(caught.value)


def test_every_file_of_ensembles_is_read():
    files = sorted(path.parent.name for path in MODELS.glob("*/ensembles.toml"))
    assert len(files) >= 3

    names = [ensemble.name for ensemble in load_ensembles()]

    assert sorted({name.partition("/")[0] for name in names}) == files
    assert len(names) == len(set(names))
    for name in names:
        assert load_ensemble(name).name == name


def test_every_member_of_every_ensemble_is_a_shipped_recipe_and_stands_in_it_once():
    named = [ensemble for ensemble in load_ensembles() if ensemble.table.members is not None]

    assert len(named) >= 9
    for ensemble in named:
        members = ensemble.named_members()
        assert set(members) <= set(recipe_names())
        assert len(set(members)) == len(members) == ensemble.num_members


def test_the_subsets_of_arxiv_1810_00207_table_3_are_there_with_both_gaps():
    """(validation, public test) by the numbers that table 3 gives the sub-models."""
    recipes = ["lfnl-netvlad", "lfnl-netrvlad", "efnl-netvlad", "soft-bof-4k", "soft-bof-8k", "gru"]
    table = {
        (1, 4): [0.8752],
        (1, 2): [0.8778],
        (1, 6): [0.8782, 0.8790],
        (1, 4, 6): [0.8800],
        (1, 2, 4, 6): [0.8820],
        (1, 2, 3, 4, 6): [0.8839, 0.88678],
        (1, 2, 3, 4, 5, 6): [0.8842],
    }

    for numbers, gaps in table.items():
        members = [f"nonlocal/{recipes[number - 1]}" for number in numbers]
        (ensemble,) = (each for each in load_ensembles() if each.table.members == members)
        assert ensemble.table.mixing == "uniform"
        assert [row.gap_at_20 for row in ensemble.table.reported][: len(gaps)] == gaps


def test_the_repeats_of_arxiv_1810_00207_table_4_are_there():
    system = load_ensemble("nonlocal/all-six").table

    assert system.file_mib == 995
    assert [(row.repeats, row.gap_at_20, row.split) for row in system.reported] == [
        (1, 0.8842, "YouTube-8M 2018, the authors' validation split"),
        (5, 0.8846, "YouTube-8M 2018, the authors' validation split"),
        (5, 0.88756, "YouTube-8M 2018, public test"),
        (10, 0.8847, "YouTube-8M 2018, the authors' validation split"),
        (10, 0.88763, "YouTube-8M 2018, public test"),
        (10, 0.88704, "YouTube-8M 2018, private test"),
    ]


def test_the_ensembles_of_the_other_papers_are_there():
    light, full = load_ensemble("willow/light-7"), load_ensemble("willow/full-25")
    pair = load_ensemble("dml/lr-lstm")

    assert (light.num_members, light.table.reported[0].gap_at_20) == (7, 0.84688)
    assert (full.num_members, full.table.reported[0].gap_at_20) == (25, 0.84967)
    assert (pair.named_members(), pair.table.mixing) == (["dml/logistic", "dml/lstm"], "gap")
    assert pair.table.reported[0].gap_at_20 == 0.81891


def test_an_ensemble_of_unpublished_members_says_so():
    with pytest.raises(RecipeError) as caught:
        load_ensemble("willow/full-25").named_members()

    assert str(caught.value) == (
        "The source of ensemble willow/full-25 does not say which its 25 members are.\n"
        "Choose another ensemble of `ensemble-kit recipes list --ensembles`, or name recipes."
    )


def test_an_unknown_ensemble_is_refused_with_the_near_one():
    with pytest.raises(RecipeError) as caught:
        load_ensemble("nonlocal/all-sic")

    assert str(caught.value) == (
        "There is no ensemble 'nonlocal/all-sic' (did you mean 'nonlocal/all-six'?).\n"
        "List the ensembles with `ensemble-kit recipes list --ensembles`."
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "mixing =",
            "mixng =",
            "ensembles.pair.mixng is not a key of a published ensemble (did you mean 'mixing'?).\n"
            f"Use one of the keys: {TABLE_KEYS}.",
        ),
        (
            'mixing = "uniform"',
            'mixing = "equal"',
            "ensembles.pair.mixing is 'equal': Input should be 'uniform', 'gap' or 'optimised'.\n"
            "Give ensembles.pair.mixing a value of the right type and range.",
        ),
        (
            'split = "test"\n',
            "",
            "ensembles.pair.reported[0].split is missing.\n"
            "Give ensembles.pair.reported[0].split a value.",
        ),
        (
            "= 0.5",
            "= 50.0",
            "ensembles.pair.reported[0].gap_at_20 is 50.0: Input should be less than or equal to "
            "1.\nGive ensembles.pair.reported[0].gap_at_20 a value of the right type and range.",
        ),
        (
            '"a/two"',
            '"a/twoo"',
            "ensembles.pair.members has 'a/twoo', which is no shipped recipe (did you mean "
            "'a/two'?).\nName recipes of `ensemble-kit recipes list`.",
        ),
        (
            '"a/two"',
            '"a/one"',
            "ensembles.pair.members has 'a/one' twice.\nName each member once.",
        ),
        (
            'title = "Two"',
            'title = "Two"\nnum_members = 3',
            "ensembles.pair has both members and num_members.\n"
            "Name the members, or give num_members where their names are not published.",
        ),
        (
            'members = ["a/one", "a/two"]\nmixing = "uniform"\n',
            "",
            "ensembles.pair has neither members nor num_members.\n"
            "Name the members, or give num_members where their names are not published.",
        ),
        (
            'mixing = "uniform"\n',
            "",
            "ensembles.pair has members, but no mixing.\n"
            "Give it one: mixing = uniform, gap or optimised.",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(old, new, message):
    assert TEXT.count(old) == 1

    assert message_of(TEXT.replace(old, new)) == f"a/ensembles.toml: {message}"


def test_a_file_that_is_not_toml_is_refused_with_the_place():
    assert message_of("[source]]") == (
        "a/ensembles.toml is not TOML: Expected newline or end of document after a statement "
        "(at line 1, column 9).\nCorrect the file at that place."
    )


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/ensembles.toml")), ids=str)
def test_the_published_json_schema_names_every_key_of_every_shipped_file(path):
    schema = json.loads(ensembles_json_schema())
    tables = tomllib.loads(path.read_text(encoding="utf-8"))

    assert schema["additionalProperties"] is False
    assert tables.keys() <= schema["properties"].keys()
    table = schema["$defs"]["EnsembleTable"]
    assert table["additionalProperties"] is False
    for ensemble in tables["ensembles"].values():
        assert set(table["required"]) <= ensemble.keys() <= table["properties"].keys()


def test_a_file_of_ensembles_is_no_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "a"
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        (folder / f"{name}.toml").write_text(tiny_recipe_text(), encoding="utf-8")
    (folder / "ensembles.toml").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(reading, "files", lambda _: tmp_path)

    assert recipe_names() == ["a/one", "a/two"]
    assert [ensemble.name for ensemble in load_ensembles()] == ["a/pair"]
