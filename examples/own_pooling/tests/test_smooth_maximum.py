"""What the package's own continuous integration runs."""

from math import exp, log
from pathlib import Path

import pytest
import torch
from own_pooling import SmoothMaximum

from ensemble_kit.parts import PartError
from ensemble_kit.testing import check_recipe, check_set_pooling

RECIPE = Path(__file__).parents[1] / "recipe.toml"


def build(sharpness: float = 4.0) -> SmoothMaximum:
    torch.manual_seed(0)
    return SmoothMaximum(num_features=5, momentum=0.1, num_units=3, sharpness=sharpness)


def test_it_is_a_set_pooling() -> None:
    check_set_pooling(build(), num_features=5)


def test_it_is_the_equation() -> None:
    layer = build().eval()
    frames, weights = torch.randn(1, 4, 5), [2.0, 0.0, 1.0, 1.0]

    pooled = layer.aggregate(
        layer.describe(frames, torch.ones(1, 4)), torch.tensor(weights).reshape(1, 1, 4)
    )

    units = layer.batch_norm(frames @ layer.weight).sigmoid()[0].tolist()
    for unit in range(3):
        total = sum(w * exp(4 * row[unit]) for w, row in zip(weights, units, strict=True))
        assert pooled[0, 0, unit].item() == pytest.approx(log(total / 4) / 4, rel=1e-5)


def test_its_argument_is_checked() -> None:
    with pytest.raises(PartError):
        build(sharpness=60)


def test_the_whole_pipeline(tmp_path: Path) -> None:
    check_recipe(str(RECIPE), tmp_path)
