import json
import tomllib
from pathlib import Path

import pytest
from builders import POOLINGS, SAMPLINGS, tiny_recipe, tiny_recipe_text
from pydantic import ValidationError

from ensemble_kit.errors import RecipeError
from ensemble_kit.recipes import reading as recipes
from ensemble_kit.recipes.reading import (
    for_modality,
    load_recipe,
    load_recipes,
    parse_recipe,
    recipe_errors,
    recipe_json_schema,
    recipe_names,
)
from ensemble_kit.store.provenance import RecipeMetadata

MODELS = Path(__file__).resolve().parents[2] / "models"
SHIPPED = sorted(path for path in MODELS.glob("*/*.toml") if path.name != "ensembles.toml")
TRAINING_KEYS = (
    "batch_size, learning_rate, learning_rate_decay, examples_per_decay, max_steps, clip_norm, "
    "l2_penalty, batch_norm_momentum, checkpoint_every, average_last, schedule, "
    "warmup_examples, clip, balance, mixup, label_smoothing, learning_rate_factors"
)
RECIPE_KEYS = "title, source, input, sampling, pooling, fusion, hidden, head, training, reported"


def message_of(*overrides, **parts):
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(overrides=overrides, **parts)
    return str(caught.value)


def is_accepted(value, schema, root):
    """Whether a JSON Schema accepts a value; raises on a keyword that it does not know."""
    types = {"object": dict, "string": str, "integer": int, "number": (int, float),
             "boolean": bool, "null": type(None)}  # fmt: skip
    if "$ref" in schema:
        return is_accepted(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    fields = value if isinstance(value, dict) else {}
    known = schema.get("properties", {})
    is_number = isinstance(value, (int, float))  # bounds say nothing of anything else
    checks = {
        "type": lambda name: (
            isinstance(value, types[name]) and (name == "boolean") == isinstance(value, bool)
        ),
        "const": lambda constant: value == constant,
        "enum": lambda options: value in options,
        "minimum": lambda least: not is_number or value >= least,
        "maximum": lambda most: not is_number or value <= most,
        "exclusiveMinimum": lambda bound: not is_number or value > bound,
        "exclusiveMaximum": lambda bound: not is_number or value < bound,
        "minProperties": lambda count: len(fields) >= count,
        "required": lambda names: set(names) <= set(fields),
        "properties": lambda _: all(
            is_accepted(fields[name], known[name], root) for name in fields if name in known
        ),
        "additionalProperties": lambda rule: all(
            rule is not False and is_accepted(fields[name], rule, root)
            for name in fields
            if name not in known
        ),
        "anyOf": lambda options: any(is_accepted(value, option, root) for option in options),
        "oneOf": lambda options: sum(is_accepted(value, option, root) for option in options) == 1,
    }
    ignored = {"title", "description", "default", "discriminator", "$defs"}
    return all(checks[key](rule) for key, rule in schema.items() if key not in ignored)


def test_every_shipped_recipe_is_read_and_none_is_missed():
    names = recipe_names()

    assert len(names) >= 10
    on_disk = [path.relative_to(MODELS).with_suffix("") for path in SHIPPED]
    assert names == sorted(path.as_posix() for path in on_disk)
    for name in names:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.title
        assert recipe.source.paper


def test_nothing_but_recipes_ensembles_and_a_template_lies_in_models():
    files = sorted(path for path in MODELS.rglob("*") if path.is_file())

    ensembles = MODELS.glob("*/ensembles.toml")
    assert files == sorted([*SHIPPED, *ensembles, MODELS / "template.toml"])


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("nonlocal/")])
def test_checkpoints_that_nonlocal_recipes_average_lie_where_their_code_averages(name):
    """17Skye17/2nd-YouTube8M, avg_eval.sh: --swa_start=300020; GRUModel.sh ends at 300,000."""
    training = load_recipe(name).training

    first = training.max_steps - (training.average_last - 1) * training.checkpoint_every
    if name == "nonlocal/gru":
        assert training.max_steps == 300_000
    else:
        assert training.max_steps == (800_000 if "soft-bof" in name else 700_000)
        assert first >= 300_020
        assert first - training.checkpoint_every < 300_020


@pytest.mark.parametrize(
    ("name", "decay", "l2_penalty"),
    [
        ("willow/bow-8000", 0.9, 1e-8),
        ("willow/gated-bow", 0.9, 1e-6),
        ("willow/gated-net-fv", 0.8, 1e-6),
        ("willow/gated-net-rvlad", 0.8, 1e-6),
        ("willow/gated-net-vlad", 0.8, 1e-6),
        ("willow/gated-net-vlad-700k", 0.8, 1e-6),
        ("willow/gru", 0.9, 1e-6),
        ("willow/lstm", 0.9, 1e-8),
        ("willow/lstm-late", 0.9, 1e-8),
        ("willow/lstm-random-frames", 0.9, 1e-8),
        ("nonlocal/efnl-netvlad", 0.8, 1e-8),
        ("nonlocal/gru", 0.9, 1e-8),
        ("nonlocal/lfnl-netrvlad", 0.8, 1e-8),
        ("nonlocal/lfnl-netvlad", 0.8, 1e-8),
        ("nonlocal/soft-bof-4k", 0.9, 1e-8),
        ("nonlocal/soft-bof-8k", 0.9, 1e-8),
    ],
)
def test_schedules_are_those_of_the_published_commands(name, decay, l2_penalty):
    """READMEs and scripts; where they leave a flag out, its default: decay 0.9, moe_l2 1e-8."""
    training = load_recipe(name).training

    assert (training.learning_rate, training.examples_per_decay) == (2e-4, 4_000_000)
    assert (training.learning_rate_decay, training.l2_penalty) == (decay, l2_penalty)


def test_nextvlad_decays_as_the_script_for_112_clusters():
    assert load_recipe("nextvlad/nextvlad").training.examples_per_decay == 2_500_000


def test_the_gaps_of_averaged_checkpoints_are_those_of_table_2_of_arxiv_1810_00207():
    recipes = [load_recipe(name) for name in recipe_names() if name.startswith("nonlocal/")]

    assert {recipe.name: recipe.reported.averaged_gap_at_20 for recipe in recipes} == {
        "nonlocal/lfnl-netvlad": 0.8716,
        "nonlocal/lfnl-netrvlad": 0.8704,
        "nonlocal/efnl-netvlad": 0.8704,
        "nonlocal/soft-bof-4k": 0.8574,
        "nonlocal/soft-bof-8k": 0.8563,
        "nonlocal/gru": 0.8612,
        "nonlocal/netvlad": None,
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_published_json_schema_accepts_every_shipped_recipe(path):
    schema = json.loads(recipe_json_schema())
    tables = tomllib.loads(path.read_text(encoding="utf-8"))

    assert is_accepted(tables, schema, schema)
    tables["training"]["max_step"] = 1
    assert not is_accepted(tables, schema, schema)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_part_is_read_with_its_arguments(pooling, sampling):
    recipe = tiny_recipe(pooling=pooling, sampling=sampling, gating=None)

    text = tomllib.loads(tiny_recipe_text(pooling=pooling, sampling=sampling))
    assert recipe.pooling.model_dump(exclude_none=True) == text["pooling"]
    assert recipe.sampling.model_dump() == text["sampling"]
    assert recipe.hidden is None
    assert recipe.reported is None


def test_a_recipe_is_loaded_from_a_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(tiny_recipe_text(), encoding="utf-8")

    recipe = load_recipe(str(path))

    assert recipe.name == "mine"
    assert recipe.metadata.text == tiny_recipe_text()


def test_overrides_are_set_recorded_and_reproduced():
    overrides = (
        "pooling.num_clusters=16",
        "head={name='logistic', probability_gating=true}",
        "hidden.gating=none",
        "training.learning_rate = 2e-4",
        "reported.gap_at_20=0.5",
        "pooling.modality_fusion=early",
    )

    recipe = tiny_recipe(overrides=overrides)
    again = parse_recipe(RecipeMetadata.model_validate_json(recipe.metadata.model_dump_json()))

    assert recipe.pooling.num_clusters == 16
    assert recipe.pooling.modality_fusion == "early"
    assert recipe.head.name == "logistic"
    assert recipe.head.probability_gating is True
    assert recipe.hidden.gating == "none"
    assert recipe.training.learning_rate == 2e-4
    assert recipe.reported.gap_at_20 == 0.5
    assert recipe.metadata.overrides == overrides
    assert recipe.metadata.text == tiny_recipe_text()
    assert again == recipe
    assert again.metadata == recipe.metadata


def test_an_override_sets_one_modality_and_a_later_one_wins():
    recipe = tiny_recipe(overrides=["pooling.num_clusters.rgb=7", "pooling.num_clusters.rgb=9"])

    assert recipe.pooling.num_clusters == {"rgb": 9, "other": 2}


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        tiny_recipe().training.max_steps = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.max_step=3",
            "training.max_step is not a key of a recipe (did you mean 'max_steps'?).\n"
            f"Use one of the keys: {TRAINING_KEYS}.",
        ),
        (
            "trainin.max_steps=3",
            "trainin is not a key of a recipe (did you mean 'training'?).\n"
            f"Use one of the keys: {RECIPE_KEYS}.",
        ),
        ("xyz=3", f"xyz is not a key of a recipe.\nUse one of the keys: {RECIPE_KEYS}."),
        (
            "sampling.name=all",
            "sampling.num_frames is not a key of the part 'all'.\nUse one of the keys: name.",
        ),
        (
            "pooling.num_cluster=3",
            "pooling.num_cluster is not a key of the part 'netvlad' (did you mean "
            "'num_clusters'?).\nUse one of the keys: name, modality_fusion, num_clusters, "
            "non_local.",
        ),
        ("hidden={gating='none'}", "hidden.size is missing.\nGive hidden.size a value."),
        (
            "head={probability_gating=false}",
            "head.name is missing.\nName the part to use as head.",
        ),
        (
            "head={name='logistic'}",
            "head.probability_gating is missing.\nGive head.probability_gating a value.",
        ),
        (
            "head.name=logistc",
            "head has name 'logistc' (did you mean 'logistic'?).\n"
            "Name one of: logistic, mixture_of_experts.",
        ),
        (
            "pooling.name=3",
            "pooling has name 3.\nName one of: average, dbof, soft_bof, gated_bof, netvlad, "
            "netrvlad, net_fv, attention_netvlad, second_order, nextvlad, gru, lstm, bigru, "
            "bilstm, attention_bigru.",
        ),
        (
            "pooling=3",
            "pooling is 3: Input should be a table.\n"
            "Give pooling a value of the right type and range.",
        ),
        (
            "hidden=none",
            "hidden is 'none': Input should be a table.\n"
            "Give hidden a value of the right type and range.",
        ),
        (
            "hidden.gating=gelu",
            "hidden.gating is 'gelu': Input should be 'context_gating', 'glu', 'se' or 'none'.\n"
            "Give hidden.gating a value of the right type and range.",
        ),
        (
            "training.max_steps=1.5",
            "training.max_steps is 1.5: Input should be a valid integer.\n"
            "Give training.max_steps a value of the right type and range.",
        ),
        (
            "training.max_steps='3'",
            "training.max_steps is '3': Input should be a valid integer.\n"
            "Give training.max_steps a value of the right type and range.",
        ),
        (
            "training.learning_rate=0",
            "training.learning_rate is 0: Input should be greater than 0.\n"
            "Give training.learning_rate a value of the right type and range.",
        ),
        (
            "training.learning_rate=inf",
            "training.learning_rate is inf: Input should be a finite number.\n"
            "Give training.learning_rate a value of the right type and range.",
        ),
        (
            "pooling.num_clusters=a",
            "pooling.num_clusters is 'a': Input should be a valid integer or a table.\n"
            "Give pooling.num_clusters a value of the right type and range.",
        ),
        (
            "pooling.num_clusters={rgb=0}",
            "pooling.num_clusters.rgb is 0: Input should be greater than or equal to 1.\n"
            "Give pooling.num_clusters.rgb a value of the right type and range.",
        ),
        (
            "pooling.num_clusters.audio=many",
            "pooling.num_clusters.audio is 'many': Input should be a valid integer.\n"
            "Give pooling.num_clusters.audio a value of the right type and range.",
        ),
        (
            "pooling.num_clusters={}",
            "pooling.num_clusters is {}: Dictionary should have at least 1 item after validation, "
            "not 0.\nGive pooling.num_clusters a value of the right type and range.",
        ),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_hint(override, message):
    assert message_of(override) == f"Recipe tiny: {message}"


def test_a_misspelt_key_says_more_than_the_missing_one():
    text = tiny_recipe_text().replace("max_steps", "max_step")

    with pytest.raises(RecipeError) as caught:
        parse_recipe(RecipeMetadata(name="tiny", text=text))

    assert caught.value.problem == (
        "Recipe tiny: training.max_step is not a key of a recipe (did you mean 'max_steps'?)."
    )


@pytest.mark.parametrize("override", ["nothing", "=3", "pooling.=3"])
def test_an_override_of_another_form_is_refused(override):
    assert message_of(override) == (
        f"--set {override!r} is not of the form table.key=value.\n"
        "Write for example --set pooling.num_clusters=16."
    )


def test_an_override_below_a_value_is_refused():
    assert message_of("title.first=3") == (
        "--set 'title.first=3': title is a value, not a table.\n"
        "Set the value itself, or name a key of a table."
    )


def test_what_is_not_toml_is_refused_with_the_place():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RecipeMetadata(name="tiny", text="title = "))

    assert str(caught.value) == (
        "Recipe tiny is not TOML: Invalid value (at end of document).\n"
        "Correct the file at that place."
    )


def test_an_unknown_recipe_is_refused_with_the_near_one():
    with pytest.raises(RecipeError) as caught:
        load_recipe("willow/gated-netvlad")

    assert str(caught.value) == (
        "There is no recipe 'willow/gated-netvlad' (did you mean 'willow/gated-net-vlad'?).\n"
        "List the recipes with `ensemble-kit recipes list`, or name a .toml file."
    )


def test_an_unknown_recipe_like_no_other_is_refused():
    with pytest.raises(RecipeError) as caught:
        load_recipe("../secrets")

    assert caught.value.problem == "There is no recipe '../secrets'."


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "mine.toml"

    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))

    assert str(caught.value) == (
        f"{path} does not exist.\n"
        "Name a TOML file that exists, or a recipe of `ensemble-kit recipes list`."
    )


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"title = '\xff'")

    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))

    assert str(caught.value) == f"{path} is not text in UTF-8.\nSave the file as UTF-8."


@pytest.mark.parametrize(
    ("value", "modality", "expected"),
    [
        (4, "rgb", 4),
        ({"rgb": 5, "audio": 3}, "audio", 3),
        ({"rgb": 5, "other": 2}, "rgb", 5),
        ({"rgb": 5, "other": 2}, "text", 2),
        ({"joint": 7}, "joint", 7),
    ],
)
def test_a_value_by_modality_is_looked_up(value, modality, expected):
    assert for_modality(value, modality, key="pooling.num_clusters") == expected


def test_a_modality_without_a_value_is_named():
    with pytest.raises(RecipeError) as caught:
        for_modality({"rgb": 5, "audio": 3}, "text", key="pooling.num_clusters")

    assert str(caught.value) == (
        "pooling.num_clusters has values for rgb, audio, not for text.\n"
        "Give it one with --set pooling.num_clusters.text=NUMBER."
    )


def test_the_root_of_recipes_is_the_packaged_folder_where_there_is_one(tmp_path, monkeypatch):
    (tmp_path / "models" / "paper").mkdir(parents=True)
    (tmp_path / "models" / "paper" / "one.toml").write_text(tiny_recipe_text(), encoding="utf-8")
    monkeypatch.setattr(recipes, "files", lambda _: Path(tmp_path))

    assert recipe_names() == ["paper/one"]
    assert load_recipe("paper/one").title == "Tiny"


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two recipes in the current folder; only the first has clusters and a hidden layer."""
    monkeypatch.chdir(tmp_path)
    for name, changes in (("a", {}), ("b", {"pooling": "average", "gating": None})):
        Path(f"{name}.toml").write_text(tiny_recipe_text(**changes))
    return ["a.toml", "b.toml"]


def test_a_value_is_set_over_the_recipes_that_have_its_key(two):
    recipes = load_recipes(two, ["pooling.num_clusters=3", "training.max_steps=7", "hidden.size=6"])

    assert [recipe.metadata.overrides for recipe in recipes] == [
        ("pooling.num_clusters=3", "training.max_steps=7", "hidden.size=6"),
        ("training.max_steps=7",),
    ]


def test_a_value_may_be_for_one_recipe_by_name(two):
    recipes = load_recipes(
        two, ["b.toml:training.max_steps=7", 'b.toml:title="x:y"', 'title="k:v"']
    )

    assert [recipe.metadata.overrides for recipe in recipes] == [
        ('title="k:v"',),
        ("training.max_steps=7", 'title="x:y"', 'title="k:v"'),
    ]
    assert [recipe.training.max_steps == 7 for recipe in recipes] == [False, True]


def test_a_value_after_another_part_is_named_is_set_over_that_part(two):
    gru = ["b.toml:pooling.name=gru", "b.toml:pooling.hidden_size=4", "pooling.state=all"]

    (_, second) = load_recipes(two, [*gru, "pooling.num_layers=2"])

    assert (second.pooling.name, second.pooling.num_layers) == ("gru", 2)


def test_a_recipe_may_be_named_without_its_folder_and_suffix(two):
    recipes = load_recipes([*two, "demo/gru"], ["b:title=B", "gru:title=G"])

    assert [recipe.title for recipe in recipes[1:]] == ["B", "G"]
    with pytest.raises(RecipeError, match="is for gru, which is not among"):
        load_recipes(["demo/gru", "willow/gru"], ["gru:title=x"])


def test_a_value_for_no_recipe_or_an_unknown_one_is_refused(two):
    with pytest.raises(RecipeError) as caught:
        load_recipes(two, ["pooling.num_cluster=3"])
    assert caught.value.problem == (
        "Recipe a: pooling.num_cluster is not a key of the part 'netvlad' "
        "(did you mean 'num_clusters'?)."
    )

    with pytest.raises(RecipeError) as caught:
        load_recipes(two, ["c.toml:title=x"])
    assert str(caught.value) == (
        "--set 'c.toml:title=x' is for c.toml, which is not among the recipes "
        "(did you mean 'b.toml'?).\nName one of: a.toml, b.toml."
    )


def test_all_that_is_wrong_with_a_recipe_is_said_at_once(two):
    text = Path("a.toml").read_text()
    Path("a.toml").write_text(
        text.replace("num_clusters", "num_clustrs").replace("max_steps = ", "max_steps = -")
    )

    problems = [error.problem for error in recipe_errors("a.toml")]

    assert len(problems) == 3
    assert problems[0] == (
        "Recipe a: pooling.num_clustrs is not a key of the part 'netvlad' "
        "(did you mean 'num_clusters'?)."
    )
    assert "Recipe a: pooling.num_clusters is missing." in problems
    assert any(problem.startswith("Recipe a: training.max_steps is -") for problem in problems)
    assert recipe_errors("b.toml") == []
