"""A whole model of another package."""

import pytest
import torch
from builders import tiny_frames, tiny_schema

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.errors import ExportError, RecipeError
from ensemble_kit.networks.building import build_model
from ensemble_kit.networks.own_model import OwnModel
from ensemble_kit.recipes.own_parts import load_part
from ensemble_kit.recipes.reading import parse_recipe
from ensemble_kit.store.provenance import RecipeMetadata
from ensemble_kit.testing import check_model, check_recipe
from ensemble_kit.training import train_checkpoints
from ensemble_kit.training.plan import RunPlan

pytestmark = pytest.mark.usefixtures("own_package")
LENGTHS = [5, 3, 0]


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
