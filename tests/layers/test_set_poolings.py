"""What holds for every pooling that sees a set of frames and a weight for each."""

import pytest
import torch
from poolings import POOLINGS, build, pool
from reference import random_indices_loops

from ensemble_kit.layers.frame_preparation import mark_frames
from ensemble_kit.layers.frame_sampling import AllFrames, RandomSampling
from ensemble_kit.networks.parts import SET_POOLINGS

LEARNING = sorted(POOLINGS.keys() - {"average"})
NON_LOCAL = ["non_local_netrvlad", "non_local_netvlad"]
OF_LENGTH_ONE = ["gated_bof", "netrvlad", "netvlad", *NON_LOCAL, "soft_bof"]
LENGTHS = [7, 4, 1]


@pytest.fixture
def frames(rng):
    return torch.randn(3, 7, 5, generator=rng, dtype=torch.float64)


@pytest.fixture
def weights():
    return AllFrames()(mark_frames(torch.tensor(LENGTHS), 7))


def test_these_are_all_set_poolings():
    kinds = {getattr(part, "func", part) for part in SET_POOLINGS.values()}

    assert {type(build(name)) for name in POOLINGS} == kinds


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("is_training", [False, True])
def test_padding_and_frame_order_change_nothing(pooling, is_training, frames, weights, rng):
    order = torch.randperm(9, generator=rng)
    padding = 10 * torch.randn(3, 2, 5, generator=rng, dtype=torch.float64)
    padded = torch.cat([frames, padding], dim=1)[:, order]
    padded_weights = torch.cat([weights, torch.zeros(3, 1, 2)], dim=2)[:, :, order]

    plain = pool(build(pooling).train(is_training), frames, weights)
    shuffled = pool(build(pooling).train(is_training), padded, padded_weights)

    torch.testing.assert_close(shuffled, plain)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_repeats_are_runs_over_drawn_and_gathered_frames(pooling, frames, rng):
    layer = build(pooling).eval()
    draws = torch.rand(4, 6, generator=rng)
    is_frame = mark_frames(torch.tensor(LENGTHS), 7)

    ours = pool(layer, frames, RandomSampling(num_frames=6)(is_frame, draws))

    for repeat, row in enumerate(draws.tolist()):
        for video, length in enumerate(LENGTHS):
            gathered = frames[video : video + 1, random_indices_loops(row, length)]
            run = pool(layer, gathered, torch.ones(1, 1, 6))
            torch.testing.assert_close(ours[video, repeat], run[0, 0])


@pytest.mark.parametrize("pooling", LEARNING)
def test_training_on_counts_is_training_on_gathered_frames(pooling, frames, rng):
    draws = torch.rand(3, 1, 6, generator=rng)
    is_frame = mark_frames(torch.tensor(LENGTHS), 7)
    gathered = torch.stack(
        [
            frames[video, random_indices_loops(draws[video, 0].tolist(), length)]
            for video, length in enumerate(LENGTHS)
        ]
    )
    counted, copied = build(pooling), build(pooling)

    ours = pool(counted, frames, RandomSampling(num_frames=6)(is_frame, draws))
    theirs = pool(copied, gathered, torch.ones(3, 1, 6))
    coefficients = torch.randn(ours.shape, generator=rng)
    (ours * coefficients).sum().backward()
    (theirs * coefficients).sum().backward()

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(counted.state_dict(), copied.state_dict())
    for one, other in zip(counted.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("pooling", sorted(POOLINGS.keys() - NON_LOCAL))
@pytest.mark.parametrize("is_training", [False, True])
def test_duplicating_every_frame_changes_nothing(pooling, is_training, frames, weights):
    twice = frames.repeat_interleave(2, dim=1), weights.repeat_interleave(2, dim=2)

    plain = pool(build(pooling).train(is_training), frames, weights)

    torch.testing.assert_close(pool(build(pooling).train(is_training), *twice), plain)


@pytest.mark.parametrize("pooling", NON_LOCAL)
def test_duplicating_every_frame_changes_what_a_non_local_block_attends_to(
    pooling, frames, weights
):
    layer = build(pooling).eval()

    twice = pool(layer, frames, 2 * weights)

    assert (twice - pool(layer, frames, weights)).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("pooling", POOLINGS)
def test_batch_composition_changes_nothing_in_evaluation(pooling, frames, weights):
    layer = build(pooling).eval()

    together = pool(layer, frames, weights)

    for video in range(3):
        alone = pool(layer, frames[video : video + 1], weights[video : video + 1])
        torch.testing.assert_close(together[video : video + 1], alone)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("is_training", [False, True])
def test_a_video_of_no_frames_is_described_by_zeros_or_their_batch_norm(
    pooling, is_training, frames
):
    layer = build(pooling).train(is_training)
    weights = AllFrames()(mark_frames(torch.tensor([7, 0, 0]), 7))

    pooled = pool(layer, frames, weights)

    assert pooled.isfinite().all()
    assert torch.equal(pooled[1], pooled[2])
    assert (pooled[1].count_nonzero() == 0) == (pooling != "nextvlad")
    assert pooled[0].count_nonzero() > 0


@pytest.mark.parametrize("pooling", OF_LENGTH_ONE)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_descriptors_have_length_one(pooling, scale, frames, weights):
    layer = build(pooling).eval()

    norms = pool(layer, frames * scale, weights).norm(dim=-1)

    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("pooling", LEARNING)
def test_gradients_reach_every_parameter(pooling, frames, weights, rng):
    layer = build(pooling)
    pooled = pool(layer, frames, weights)

    (pooled * torch.randn(pooled.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name
