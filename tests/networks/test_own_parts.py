import pytest
import torch
from builders import tiny_frames, tiny_recipe_text, tiny_schema
from own_package import install

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.errors import ExportError, RecipeError
from ensemble_kit.networks.building import build_model
from ensemble_kit.networks.own_model import OwnModel
from ensemble_kit.networks.products import output_axes
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes import own_parts
from ensemble_kit.recipes.own_parts import load_part
from ensemble_kit.recipes.reading import parse_recipe
from ensemble_kit.store.provenance import RecipeMetadata
from ensemble_kit.testing import check_model, check_recipe
from ensemble_kit.training import train_checkpoints
from ensemble_kit.training.plan import RunPlan

LENGTHS = [5, 3, 0]


@pytest.fixture(scope="module", autouse=True)
def _package(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(install(tmp_path_factory.mktemp("own")))
        own_parts._offered.cache_clear()
        own_parts._import.cache_clear()
        yield
    own_parts._offered.cache_clear()
    own_parts._import.cache_clear()


def built(old, new, **parts):
    text = tiny_recipe_text(**{"pooling": "average", **parts}).replace(old, new)
    return SubModel(parse_recipe(RecipeMetadata(name="mine", text=text)), tiny_schema()).eval()


def message_of(pooling):
    with pytest.raises(RecipeError) as caught:
        built('name = "average"', pooling)
    return f"{caught.value.problem} {caught.value.hint}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "average"', 'name = "own-parts:first"\nscale = 2'),
        ('name = "average"', 'name = "own-parts:last"'),
        ('name = "all"', 'name = "own-parts:half"'),
        ("[head]", '[fusion]\nname = "own-parts:sum"\n[head]'),
        ('"context_gating"', '{ name = "own-parts:scale", by = 0.5 }'),
        ('name = "logistic"', 'name = "own-parts:softmax"'),
    ],
    ids=["set pooling", "sequence pooling", "sampling", "fusion", "gating", "head"],
)
def test_a_sub_model_takes_a_part_of_another_package_at_each_place(rng, old, new):
    model = built(old, new, head="logistic")
    frames, counts = tiny_frames(model.schema, LENGTHS, rng)

    probabilities = model(frames, counts)

    assert probabilities.shape == (3, 4)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    changed = {name: frame.clone() for name, frame in frames.items()}
    for frame in changed.values():
        frame[1, 3:] = 9  # padding
    torch.testing.assert_close(model(changed, counts), probabilities)


def test_an_own_head_is_the_one_that_computes(rng):
    model = built('name = "logistic"', 'name = "own-parts:softmax"', head="logistic")
    frames, counts = tiny_frames(model.schema, LENGTHS, rng)

    torch.testing.assert_close(model(frames, counts).sum(dim=1), torch.ones(3))


def test_an_own_sampling_is_left_to_the_model_not_to_the_reader():
    assert built('name = "all"', 'name = "own-parts:half"').frame_choice is None


def test_a_part_says_which_of_its_matrices_are_no_products():
    axes = output_axes(built('name = "average"', 'name = "own-parts:first"\nscale = 2'))

    assert axes
    assert not [name for name in axes if name.endswith("scales")]


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (
            'name = "own-parts:first"\nscale = 13',
            "pooling.scale is 13 for rgb, but 13 brings bad luck. Set pooling.scale of rgb to 12.",
        ),
        (
            'name = "own-parts:first"\nscale = 14',
            "The part own-parts:first cannot be built: OSError: no disk. Correct the package, or "
            "the recipe's keys for it.",
        ),
        (
            'name = "own-parts:lame"',
            "The part own-parts:lame has no output_size and no projection_fan_in and no "
            "loops_over_repeats and no aggregate. Give it what ensemble_kit.parts.SetPooling "
            "describes.",
        ),
    ],
    ids=["argument", "constructor", "contract"],
)
def test_an_own_part_that_cannot_be_used_is_refused_by_name(pooling, message):
    assert message_of(pooling) == message


WHOLE = """
title = "A whole model"

[model]
name = "own-parts:whole"
size = 64

[training]
batch_size = 8
learning_rate = 0.01
learning_rate_decay = 0.9
examples_per_decay = 1_000
max_steps = 4
l2_penalty = 1e-6
checkpoint_every = 2
average_last = 2
"""


def whole_recipe(*overrides):
    return parse_recipe(RecipeMetadata(name="whole", text=WHOLE, overrides=overrides))


def test_a_whole_model_of_another_package_is_what_checks_ask_for():
    torch.manual_seed(0)
    model = load_part("own-parts:whole")(
        widths={"rgb": 5, "audio": 3}, num_classes=4, size=8, classes_too_many=0
    )

    check_model(model, widths={"rgb": 5, "audio": 3}, num_classes=4)


def test_a_whole_model_reads_dequantised_frames_and_no_padding(rng):
    model = build_model(whole_recipe(), tiny_schema(value_type="uint8")).eval()
    frames, counts = tiny_frames(model.schema, LENGTHS, rng)

    probabilities = model(frames, counts)

    assert isinstance(model, OwnModel)
    assert model.regularised() == [model.model.output.weight]
    features = {name: stored * (4 / 255) + (4 / 512 - 2) for name, stored in frames.items()}
    torch.testing.assert_close(model.model(features, counts), probabilities)


def test_a_whole_model_goes_through_the_pipeline(tmp_path):
    path = tmp_path / "whole.toml"
    path.write_text(WHOLE, encoding="utf-8")

    check_recipe(str(path), tmp_path / "work", dtypes=["int4"])


def test_a_whole_model_with_the_wrong_number_of_classes_is_refused(tmp_path):
    synthesize(tmp_path / "records", num_videos={"train": 8}, num_classes=6, num_shards=1)
    plan = RunPlan(
        recipe=whole_recipe("model.classes_too_many=1"),
        training=Records([tmp_path / "records" / "train"]),
        folder=tmp_path / "run",
    )

    with pytest.raises(RecipeError, match=r"returned numbers of shape \(8, 7\), not \(8, 6\)"):
        train_checkpoints(plan)


def test_a_whole_model_that_cannot_be_exported_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "deciding.toml"
    path.write_text(WHOLE.replace(":whole", ":deciding"), encoding="utf-8")

    with pytest.raises(ExportError, match="PyTorch cannot export a member to ONNX: "):
        check_recipe(str(path), tmp_path / "work", dtypes=["bf16"])

    assert not list((tmp_path / "work").glob("*.onnx"))
