import json
import re
import subprocess
import sys

import pytest
from builders import tiny_recipe_text, tiny_schema

from ensemble_kit.cli import main
from ensemble_kit.data.schema import write_schema
from ensemble_kit.networks.parts import (
    FUSIONS,
    GATINGS,
    HEADS,
    SAMPLINGS,
    SEQUENCE_POOLINGS,
    SET_POOLINGS,
)
from ensemble_kit.recipes.reading import recipe_names, recipe_root
from ensemble_kit.recipes.tables import HiddenTable, TrainingTable


@pytest.fixture
def recipes(runner):
    def run(*words):
        result = runner.invoke(main, ["recipes", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def refused(runner):
    def run(*words):
        result = runner.invoke(main, ["recipes", *words])
        assert (result.exit_code, result.stdout) == (1, "")
        return result.stderr

    return run


def test_list_is_a_table_of_every_shipped_recipe(recipes):
    header, *lines = recipes("list").splitlines()

    assert header.split("  ")[0] == "name"
    assert [line.split()[0] for line in lines] == recipe_names()
    assert len(lines) >= 61
    rows = {line.split()[0]: line.split(maxsplit=5) for line in lines}
    assert rows["nonlocal/soft-bof-4k"] == [
        "nonlocal/soft-bof-4k", "arXiv:1810.00207", "28,561,492", "54.5", "0.8525",
        "YouTube-8M 2018, the authors' validation split",
    ]  # fmt: skip
    assert rows["demo/gru"] == ["demo/gru", "arXiv:1810.00207", "4,131,116", "7.9", "-", "-"]


def test_columns_of_the_list_stand_below_their_names(recipes):
    header, line = recipes("list", "--paper", "nextvlad").splitlines()

    assert header == (
        "name               paper              parameters  MiB in bf16  GAP@20   reported on"
    )
    assert line == (
        "nextvlad/nextvlad  arXiv:1811.05014   78,643,170        150.1  0.87846  "
        "YouTube-8M 2018, private test"
    )


def test_list_as_json_has_titles_parts_and_bytes_too(recipes):
    (entry,) = json.loads(recipes("list", "--part", "non_local", "--paper", "EFNL", "--json"))

    assert entry == {
        "name": "nonlocal/efnl-netvlad",
        "title": "Early-fused non-local NetVLAD, 64 clusters, 2 experts",
        "paper": "arXiv:1810.00207, sections 2.1 and 2.2, table 1, row 'EFNL-NetVLAD'",
        "parts": [
            "random", "netvlad", "non_local", "context_gating", "mixture_of_experts",
            "probability_gating",
        ],
        "parameters": 111_697_852,
        "values": 111_710_056,
        "bytes": {"fp32": 446_840_224, "bf16": 223_420_112},
        "reported": {
            "gap_at_20": 0.8674,
            "averaged_gap_at_20": 0.8704,
            "split": "YouTube-8M 2018, the authors' validation split",
            "checkpoint_mib": 427,
        },
    }  # fmt: skip
    (demo,) = json.loads(recipes("list", "--paper", "demo", "--part", "gru", "--json"))
    assert demo["reported"] is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--paper", "1810.00530"],
            ["attention-enhanced", "attention-netvlad", "baseline-netvlad", "second-order"],
        ),
        (["--paper", "mfb", "--part", "mfb"], ["average-mfb", "dbof-mfb", "net-vlad-mfb"]),
        (
            ["--paper", "mfb", "--part", "concat"],
            ["average-concat", "dbof-concat", "net-vlad-concat"],
        ),
        (["--part", "se"], ["nextvlad"]),
    ],
)
def test_the_list_is_filtered_by_paper_and_part(options, expected, recipes):
    lines = recipes("list", *options).splitlines()[1:]

    assert [line.split()[0].partition("/")[2] for line in lines] == expected


def test_a_filter_that_leaves_nothing_says_what_there_is(refused):
    assert refused("list", "--paper", "nobody") == (
        "Error: No recipe is from 'nobody'.\n"
        "Name a folder (attention, demo, dml, mfb, nextvlad, nonlocal, willow) or a part of a "
        "paper's reference.\n"
    )
    assert refused("list", "--paper", "dml", "--part", "netvlad") == (
        "Error: No recipe from 'dml' has the part 'netvlad'.\n"
        "Name one of: all, attention_bigru, average, bigru, bilstm, logistic, lstm, "
        "mixture_of_experts, projection, shared.\n"
    )
    assert refused("list", "--part", "netvladd").startswith(
        "Error: No recipe has the part 'netvladd'.\nName one of: all, attention_bigru, "
    )


def test_ensembles_are_a_table_with_a_line_for_each_reported_gap(recipes):
    header, *lines = recipes("list", "--ensembles").splitlines()

    assert header == (
        f"{'name':<23}  paper             members  mixing   MiB in bf16  repeats  GAP@20   "
        "reported on"
    )
    assert len(lines) >= 17
    assert (
        f"{'dml/lr-lstm':<23}  Zhao (2018)             2  gap             79.3        -  "
        in (lines[0])
    )
    assert lines[-1] == (
        f"{'willow/full-25':<23}  arXiv:1706.06905       25  -                  -        -  "
        "0.84967  YouTube-8M 2017, private test"
    )
    assert [line.split(maxsplit=7)[1:] for line in lines if line.startswith("nonlocal/all-six")][
        -1
    ] == [
        "arXiv:1810.00207", "6", "uniform", "994.1", "10", "0.88704",
        "YouTube-8M 2018, private test",
    ]  # fmt: skip


def test_ensembles_as_json_have_members_and_bytes_too(recipes):
    light, full = json.loads(recipes("list", "--ensembles", "--paper", "willow", "--json"))

    assert light == {
        "name": "willow/light-7",
        "title": "Ours (Light): seven models, enough for the first place",
        "paper": "arXiv:1706.06905, section 5.7, table 4",
        "members": [
            "willow/gated-net-vlad-700k", "willow/gated-net-fv", "willow/gated-bow",
            "willow/bow-8000", "willow/gated-net-rvlad", "willow/gru", "willow/lstm-random-frames",
        ],
        "num_members": 7,
        "mixing": "uniform",
        "values": 1_198_645_256,
        "bytes": {"fp32": 4_794_581_024, "bf16": 2_397_290_512},
        "file_mib": None,
        "reported": [{"gap_at_20": 0.84688, "split": "YouTube-8M 2017, private test"}],
    }  # fmt: skip
    assert (full["members"], full["num_members"], full["bytes"]) == (None, 25, None)


def test_the_size_of_the_submitted_system_is_the_papers(recipes):
    """arXiv:1810.00207, section 3.4: 995 MiB in bfloat16, the table of the graph included."""
    entries = json.loads(recipes("list", "--ensembles", "--paper", "nonlocal", "--json"))
    (system,) = (entry for entry in entries if entry["name"] == "nonlocal/all-six")

    assert system["file_mib"] == 995
    assert 994 < system["bytes"]["bf16"] / 2**20 < 995


def test_filters_of_ensembles_that_leave_nothing_say_so(runner, refused):
    assert refused("list", "--ensembles", "--paper", "mfb") == (
        "Error: No ensemble is from 'mfb'.\n"
        "Name a folder (dml, nonlocal, willow) or a part of a paper's reference.\n"
    )
    result = runner.invoke(main, ["recipes", "list", "--ensembles", "--part", "gru"])
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: --part selects recipes; leave it or --ensembles out.\n")


def test_show_prints_the_text_as_it_lies_there(recipes):
    text = (recipe_root() / "willow" / "gru.toml").read_text(encoding="utf-8")

    assert recipes("show", "willow/gru") == text.rstrip() + "\n"


def test_show_gives_the_papers_size_without_allocating_it():
    """arXiv:1810.00207, table 1: 109 MiB in fp32, which are 28,572,796 numbers."""
    code = (
        "import resource; from ensemble_kit.cli import main; import torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "main(['recipes', 'show', 'nonlocal/soft-bof-4k', '--json'], standalone_mode=False)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import sys; print(after - before, file=sys.stderr)\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    shown = json.loads(result.stdout)
    assert shown["schema"] == "youtube8m-2018"
    assert shown["parameters"] == 28_561_492
    assert shown["values"] == 28_572_796
    assert shown["bytes"] == {"fp32": 114_291_184, "bf16": 57_145_592}
    kibibytes = int(result.stderr) // (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 2**16  # 64 MiB; its weights would take 109


def test_show_gives_values_for_the_schema_asked_for(recipes, tmp_path):
    (tmp_path / "mine.toml").write_text(tiny_recipe_text(pooling="average", gating=None))
    write_schema(tiny_schema(), tmp_path / "schema.toml", force=False)
    options = ["--set", "head.num_experts=3", "--schema", str(tmp_path / "schema.toml")]

    shown = json.loads(recipes("show", str(tmp_path / "mine.toml"), "--json", *options))

    values = 8 * 4 * 4 + 8 * 4 * 3 + 4 * 3  # gates without bias, experts and their bias
    assert (shown["parameters"], shown["values"]) == (values, values)
    assert shown["bytes"] == {"fp32": 4 * values, "bf16": 2 * values}
    assert (shown["name"], shown["overrides"]) == ("mine", ["head.num_experts=3"])
    assert shown["recipe"]["head"]["num_experts"] == 3
    assert "reported" not in shown["recipe"]


@pytest.mark.parametrize("schema", ["youtube8m-2017", "youtube8m-2018", "audioset"])
def test_published_schemas_are_known_by_name(schema, recipes):
    shown = json.loads(recipes("show", "willow/average-logistic", "--json", "--schema", schema))

    width, classes = {
        "youtube8m-2017": (1152, 4716),
        "youtube8m-2018": (1152, 3862),
        "audioset": (128, 527),
    }[schema]
    assert shown["parameters"] == (width + 1) * classes


def test_a_schema_of_no_known_name_is_refused(refused):
    assert refused("show", "willow/gru", "--json", "--schema", "youtube") == (
        "Error: There is no schema 'youtube'.\n"
        "Name one of youtube8m-2018, youtube8m-2017, audioset, or a schema TOML.\n"
    )


def test_a_recipe_that_does_not_fit_the_schema_is_refused(refused):
    assert refused(
        "show", "nonlocal/soft-bof-4k", "--json", "--schema", "audioset",
        "--set", "pooling.num_clusters={rgb=7}",
    ) == (
        "Error: pooling.num_clusters has values for rgb, not for audio.\n"
        "Give it one with --set pooling.num_clusters.audio=NUMBER.\n"
    )  # fmt: skip


def test_copy_gives_a_file_that_check_accepts_and_nothing_is_overwritten(
    recipes, refused, tmp_path
):
    copy = tmp_path / "mine" / "my-gru.toml"

    assert recipes("copy", "willow/gru", str(copy)) == f"{copy}\n"

    text = copy.read_text()
    assert text == (recipe_root() / "willow" / "gru.toml").read_text(encoding="utf-8")
    title = text.splitlines()[0].split('"')[1]
    assert recipes("check", str(copy)) == f"{copy}: {title}\n"
    copy.write_text("mine")
    assert refused("copy", "willow/gru", str(copy)) == (
        f"Error: {copy} exists already.\nName another output, or replace it with --force.\n"
    )
    assert copy.read_text() == "mine"
    recipes("copy", "willow/gru", str(copy), "--force")
    assert copy.read_text() == text


def test_new_writes_a_recipe_whose_comments_name_every_part_and_key(recipes, refused, tmp_path):
    path = tmp_path / "mine.toml"

    assert recipes("new", str(path)) == f"{path}\n"

    assert recipes("check", str(path)) == f"{path}: My sub-model\n"
    words = set(re.findall(r"[a-z_0-9]+", path.read_text()))
    parts = [*SAMPLINGS, *SET_POOLINGS, *SEQUENCE_POOLINGS, *FUSIONS, *GATINGS, *HEADS]
    assert set(parts) <= words
    assert set(HiddenTable.model_fields) - {"remove_diagonal"} <= words
    assert set(TrainingTable.model_fields) <= words
    assert "exists already" in refused("new", str(path))


def test_check_names_the_one_problem_of_a_file_that_is_no_recipe(runner, tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(tiny_recipe_text())
    bad.write_text(tiny_recipe_text(pooling="gru").replace("num_layers", "layers = 1\nnum_layers"))

    result = runner.invoke(main, ["recipes", "check", str(good), str(bad)])

    assert (result.exit_code, result.stdout) == (1, f"{good}: Tiny\n")
    assert result.stderr == (
        "Error: Recipe bad: pooling.layers is not a key of the part 'gru' (did you mean "
        "'num_layers'?).\n"
        "Use one of the keys: name, modality_fusion, hidden_size, num_layers, state.\n"
    )


def test_schema_of_ensembles_is_a_json_schema_too(recipes):
    schema = json.loads(recipes("schema", "--ensembles"))

    assert schema["properties"].keys() == {"source", "ensembles"}


def test_schema_is_a_json_schema_that_knows_every_table(recipes):
    schema = json.loads(recipes("schema"))

    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    assert schema["properties"].keys() == {
        "title", "source", "input", "sampling", "pooling", "fusion", "hidden", "head", "training",
        "reported",
    }  # fmt: skip
    assert schema["$defs"]["NetVLADTable"]["properties"]["name"]["const"] == "netvlad"


def test_check_names_all_problems_of_all_files_in_one_run(runner, tmp_path):
    good, bad, worse = (tmp_path / f"{name}.toml" for name in ("good", "bad", "worse"))
    good.write_text(tiny_recipe_text())
    bad.write_text(tiny_recipe_text().replace("title", "titel"))
    worse.write_text("[")

    result = runner.invoke(main, ["recipes", "check", str(good), str(bad), str(worse)])

    assert result.exit_code == 1
    assert result.stdout == f"{good}: Tiny\n"
    keys = "title, source, input, sampling, pooling, fusion, hidden, head, training, reported"
    assert result.stderr == (
        "Error: There are 3 problems.\n"
        "Recipe bad: titel is not a key of a recipe (did you mean 'title'?). "
        f"Use one of the keys: {keys}.\n"
        "Recipe bad: title is missing. Give title a value.\n"
        "Recipe worse is not TOML: Invalid initial character for a key part (at end of "
        "document). Correct the file at that place.\n"
        "Correct them, and check again.\n"
    )


def test_check_says_the_same_as_json(runner, tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(tiny_recipe_text().replace("max_steps = 6", "max_steps = 0"))

    result = runner.invoke(main, ["recipes", "check", "--json", str(bad)])

    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)
    assert found["file"] == str(bad)
    assert found["problems"] == [
        {
            "problem": "Recipe bad: training.max_steps is 0: Input should be greater than or "
            "equal to 1.",
            "hint": "Give training.max_steps a value of the right type and range.",
        }
    ]


def test_a_title_of_several_lines_is_printed_as_one(runner, tmp_path):
    recipe = tmp_path / "a.toml"
    recipe.write_text(tiny_recipe_text().replace('title = "', 'title = "```\\n# x\\u001b '))

    result = runner.invoke(main, ["recipes", "check", str(recipe)])

    assert (result.exit_code, result.stdout) == (0, f"{recipe}: ```\\n# x\\x1b Tiny\n")
