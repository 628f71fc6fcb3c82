import json
import logging
import sys

import pytest
from builders import tiny_recipe_text
from own_package import install

from ensemble_kit.errors import RecipeError
from ensemble_kit.recipes import own_parts
from ensemble_kit.recipes.reading import parse_recipe, recipe_errors, recipe_json_schema
from ensemble_kit.recipes.tables import PoolingTable
from ensemble_kit.store.provenance import RecipeMetadata

POOLING = 'name = "own-parts:first"\nscale = 2'


def forget():
    own_parts._offered.cache_clear()
    own_parts._import.cache_clear()
    sys.modules.pop("own_parts_of_tests", None)


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path))
    forget()
    yield tmp_path
    forget()


def text_with(pooling, **parts):
    text = tiny_recipe_text(pooling="average", **parts)
    return text.replace('name = "average"', pooling)


def recipe_of(text, **about):
    return parse_recipe(RecipeMetadata(name="mine", text=text, **about))


def message_of(text, **about):
    with pytest.raises(RecipeError) as caught:
        recipe_of(text, **about)
    return f"{caught.value.problem} {caught.value.hint}"


def test_a_part_of_another_package_has_keys_of_its_own(package):
    recipe = recipe_of(text_with(POOLING))

    assert isinstance(recipe.pooling, PoolingTable)
    assert (recipe.pooling.name, recipe.pooling.scale) == ("own-parts:first", 2)
    assert recipe.metadata.packages == {"own-parts": "0.1.0"}
    assert recipe.model_dump()["pooling"]["scale"] == 2
    json.dumps(recipe.model_dump(mode="json"))


@pytest.mark.parametrize("name", ["Own.Parts:first", "own_parts:first"])
def test_a_package_is_found_as_indexes_write_its_name(package, name):
    recipe = recipe_of(text_with(f'name = "{name}"\nscale = 2'))

    assert recipe.metadata.packages == {"own-parts": "0.1.0"}


def test_a_recipe_of_the_kits_own_parts_names_no_package(package):
    assert recipe_of(tiny_recipe_text()).metadata.packages == {}


def test_an_own_gating_stands_by_its_name_or_with_keys(package):
    text = tiny_recipe_text(pooling="average")
    by_table = '{ name = "own-parts:scale", by = 0.5 }'

    recipe = recipe_of(text.replace('"context_gating"', by_table))

    assert recipe.hidden.gating_name == "own-parts:scale"
    assert recipe.hidden.gating.by == 0.5
    assert message_of(text.replace('"context_gating"', '"own-parts:scale"')) == (
        "Recipe mine: hidden.gating.by is missing. Give hidden.gating.by a value."
    )


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (
            'name = "own-parts:first"\nscale = 2\nscal = 3',
            "Recipe mine: pooling.scal is not a key of the part 'own-parts:first' (did you mean "
            "'scale'?). Use one of the keys: name, modality_fusion, scale.",
        ),
        (
            'name = "own-parts:first"\nscale = "2"',
            "Recipe mine: pooling.scale is '2': Input should be a valid integer. Give "
            "pooling.scale a value of the right type and range.",
        ),
        (
            'name = "own-parts:frist"',
            "No installed package offers the part 'own-parts:frist' (did you mean "
            "'own-parts:first'?). Install 'own-parts', or name a part that is offered: "
            "own-parts:absent, own-parts:deciding, own-parts:first, own-parts:half, "
            "own-parts:lame, own-parts:last, own-parts:scale, own-parts:softmax, "
            "own-parts:sum, own-parts:whole.",
        ),
        (
            'name = "own-parts:absent"',
            "The part own-parts:absent cannot be imported from own_parts_of_tests:Absent: "
            "AttributeError: module 'own_parts_of_tests' has no attribute 'Absent'. Correct or "
            "reinstall own-parts.",
        ),
        (
            'name = "own-parts:softmax"',
            "own-parts:softmax: its Table is not a PoolingTable, so it cannot stand at this "
            "place. Derive it from ensemble_kit.parts.PoolingTable, or use the part elsewhere.",
        ),
    ],
    ids=["key", "type", "name", "import", "place"],
)
def test_what_is_wrong_with_an_own_part_is_said_as_of_the_kits_own(package, pooling, message):
    assert message_of(text_with(pooling)) == message


def test_all_problems_of_an_own_part_are_named_at_once(package, tmp_path):
    path = tmp_path / "mine.toml"
    text = text_with('name = "own-parts:first"\nscal = 3')
    path.write_text(text.replace("max_steps = 6", "max_steps = 0"), encoding="utf-8")

    assert [error.problem for error in recipe_errors(str(path))] == [
        "Recipe mine: pooling.scal is not a key of the part 'own-parts:first' (did you mean "
        "'scale'?).",
        "Recipe mine: pooling.scale is missing.",
        "Recipe mine: training.max_steps is 0: Input should be greater than or equal to 1.",
    ]


def test_a_file_whose_package_is_not_installed_says_which_to_install():
    assert message_of(text_with(POOLING), packages={"own-parts": "0.1.0"}) == (
        "Recipe mine has a part of the package own-parts 0.1.0, which is not installed. "
        "Install it: pip install own-parts==0.1.0"
    )


def test_a_file_of_another_version_is_read_with_a_warning(package, caplog):
    with caplog.at_level(logging.WARNING, logger="ensemble_kit"):
        for _ in range(2):  # said once
            recipe = recipe_of(text_with(POOLING), packages={"own-parts": "0.0.9"})

    assert caplog.messages == [
        "Recipe mine was trained with own-parts 0.0.9; 0.1.0 is installed, and may compute other "
        "numbers."
    ]
    assert recipe.metadata.packages == {"own-parts": "0.0.9"}


def test_the_schema_for_editors_takes_names_of_other_packages():
    schema = json.loads(recipe_json_schema())

    assert "^[^:]+:[^:]+$" in json.dumps(schema["properties"]["pooling"])
