"""The public checks pass the kit's own parts, and fail parts that are broken in one way each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ensemble_kit.layers.average_pooling import AveragePooling
from ensemble_kit.layers.context_gating import ContextGating
from ensemble_kit.layers.frame_sampling import RandomSampling, SequenceSampling, UniformSampling
from ensemble_kit.layers.heads import Logistic, MixtureOfExperts
from ensemble_kit.layers.recurrent import RecurrentPooling
from ensemble_kit.layers.soft_bof import SoftBoF
from ensemble_kit.recipes import own_parts
from ensemble_kit.testing import (
    check_gating,
    check_head,
    check_recipe,
    check_sampling,
    check_sequence_pooling,
    check_set_pooling,
)

OWN_POOLING = Path(__file__).resolve().parents[1] / "examples" / "own_pooling"


def test_the_kits_own_parts_pass():
    check_set_pooling(SoftBoF(num_features=5, num_clusters=3, momentum=0.1), num_features=5)
    check_set_pooling(AveragePooling(num_features=5), num_features=5)
    gru = RecurrentPooling(
        cell="gru", is_bidirectional=False, num_features=5, hidden_size=3, num_layers=1, state="all"
    )
    check_sequence_pooling(gru, num_features=5)
    check_gating(ContextGating(num_features=5, momentum=0.1), num_features=5)
    check_head(Logistic(num_features=5, num_classes=4), num_features=5, num_classes=4)
    mixture = MixtureOfExperts(num_features=5, num_classes=4, num_experts=2)
    check_head(mixture, num_features=5, num_classes=4)
    for sampling in (RandomSampling, SequenceSampling, UniformSampling):
        check_sampling(sampling(num_frames=3))


class Broken(AveragePooling):
    """Average pooling with something wrong."""

    def __init__(self, problem):
        super().__init__(num_features=5)
        self.problem = problem
        if problem == "parameter":
            self.unused = nn.Parameter(torch.zeros(2))

    def aggregate(self, described, frame_weights):
        (frames,) = described
        pooled = super().aggregate(described, frame_weights)
        if self.problem == "order":
            return pooled + frames[:, :1]
        if self.problem == "padding":
            return pooled + frames.mean(dim=1, keepdim=True)
        if self.problem == "weights":
            return super().aggregate(described, (frame_weights > 0).float())
        if self.problem == "shape":
            return pooled[..., :4]
        if self.problem == "nothing":
            return pooled / frame_weights.sum(dim=-1, keepdim=True).bool()
        return pooled * getattr(self, "unused", torch.ones(1)).sum().detach().add(1)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("order", "in another order of frames"),
        ("padding", "with something else in the padding"),
        ("weights", "when frames are drawn, not weighted"),
        ("shape", "aggregate returned"),
        ("nothing", "not finite"),
        ("parameter", "has no gradient"),
    ],
)
def test_a_broken_set_pooling_is_found(problem, message):
    with pytest.raises(AssertionError, match=message):
        check_set_pooling(Broken(problem), num_features=5)


class Reader(nn.Module):
    """The mean of all rows, padding included."""

    output_size = projection_fan_in = 5

    def forward(self, frames, num_frames):
        return frames.mean(dim=1)


def test_other_broken_parts_are_found():
    with pytest.raises(AssertionError, match="without the padding"):
        check_sequence_pooling(Reader(), num_features=5)
    with pytest.raises(AssertionError, match="the gating returned"):
        check_gating(nn.Linear(5, 4), num_features=5)
    with pytest.raises(AssertionError, match="within"):
        check_head(nn.Linear(5, 4), num_features=5, num_classes=4)


class Late(UniformSampling):
    """Uniform sampling that says it took other frames."""

    def indices(self, is_frame, draws=None):
        return torch.zeros_like(super().indices(is_frame, draws))

    def forward(self, is_frame, draws=None):
        return is_frame.unsqueeze(1).float()


def test_a_sampling_whose_indices_say_something_else_is_found():
    with pytest.raises(AssertionError, match="counted by its indices"):
        check_sampling(Late(num_frames=3))


def test_an_installed_package_of_ones_own_goes_through_the_pipeline(tmp_path, monkeypatch):
    target = tmp_path / "site"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, "-m", *install, target, OWN_POOLING], check=True, timeout=120)
    monkeypatch.syspath_prepend(target)
    own_parts._offered.cache_clear()

    check_recipe(str(OWN_POOLING / "recipe.toml"), tmp_path / "work", dtypes=["int4"])
    own_parts._offered.cache_clear()
