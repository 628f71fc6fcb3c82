from math import sqrt

import pytest
import torch
from builders import stir
from poolings import build, pool, repeated
from reference import l2_loops, netvlad_loops, non_local_loops, residual_sums_loops

from ensemble_kit.layers.netvlad import NetVLAD

COUNTS = [[[1, 0, 2, 3], [1, 1, 1, 1]], [[2, 1, 0, 0], [0, 3, 0, 0]]]


def test_matches_the_paper_equation(rng):
    layer = stir(NetVLAD(num_features=5, num_clusters=3, momentum=0.1).double()).eval()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = layer.aggregate(layer.describe(frames, torch.tensor(COUNTS)[:, 0]), torch.tensor(COUNTS))

    assignments = layer.assignment(frames, torch.ones(2, 4)).tolist()
    for video in range(2):
        for repeat in range(2):
            counts = COUNTS[video][repeat]
            paper = netvlad_loops(
                repeated(frames[video].tolist(), counts),
                repeated(assignments[video], counts),
                layer.centres.tolist(),
            )
            torch.testing.assert_close(ours[video, repeat].tolist(), paper)
    assert ours.shape[-1] == layer.output_size == 15


@pytest.mark.parametrize("name", ["netrvlad", "non_local_netrvlad", "non_local_netvlad"])
def test_its_variants_match_the_paper_equations(name, rng):
    layer = build(name).eval()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = pool(layer, frames, torch.tensor(COUNTS))

    assignments = layer.assignment(frames, torch.ones(2, 4)).tolist()
    centres = [[0.0] * 5] * 3 if layer.centres is None else layer.centres.tolist()
    for video in range(2):
        for repeat in range(2):
            counts = COUNTS[video][repeat]
            rows = residual_sums_loops(
                repeated(frames[video].tolist(), counts),
                repeated(assignments[video], counts),
                centres,
            )
            if (block := layer.non_local) is not None:
                matrices = [m.tolist() for m in (block.theta, block.phi, block.g, block.output)]
                rows = non_local_loops(rows, *matrices, 0.5)
            paper = l2_loops([x for row in rows for x in l2_loops(row)])
            torch.testing.assert_close(ours[video, repeat].tolist(), paper)
    assert ours.shape[-1] == layer.output_size == 15
    assert (layer.centres is None) == name.endswith("netrvlad")


@pytest.mark.parametrize("name", ["netvlad", "netrvlad"])
def test_a_non_local_block_with_a_zero_output_matrix_changes_nothing(name, rng):
    plain, blocked = build(name).eval(), build(f"non_local_{name}").eval()
    missing = blocked.load_state_dict(plain.state_dict(), strict=False).missing_keys
    blocked.non_local.output.data.zero_()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = pool(blocked, frames, torch.tensor(COUNTS))

    assert torch.equal(ours, pool(plain, frames, torch.tensor(COUNTS)))
    assert missing == [f"non_local.{matrix}" for matrix in ("theta", "phi", "g", "output")]


def test_with_centres_at_zero_it_is_netrvlad(rng):
    netvlad, netrvlad = build("netvlad").eval(), build("netrvlad").eval()
    netvlad.load_state_dict(netrvlad.state_dict(), strict=False)
    netvlad.centres.data.zero_()
    frames = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)

    ours = pool(netvlad, frames, torch.tensor(COUNTS))

    assert torch.equal(ours, pool(netrvlad, frames, torch.tensor(COUNTS)))


def test_with_centres_at_zero_it_is_the_normalised_sums(rng):
    layer = stir(NetVLAD(num_features=5, num_clusters=3, momentum=0.1).double()).eval()
    layer.centres.data.zero_()
    frames = torch.randn(1, 4, 5, generator=rng, dtype=torch.float64)
    weights = torch.ones(1, 1, 4)

    ours = layer.aggregate(layer.describe(frames, weights[:, 0]), weights)

    sums = (layer.assignment(frames, weights[:, 0])[0].T @ frames[0]).tolist()
    paper = l2_loops([x for cluster in sums for x in l2_loops(cluster)])
    torch.testing.assert_close(ours[0, 0].tolist(), paper)


def test_residuals_are_the_descriptor_before_it_is_normalised(rng):
    layer = stir(NetVLAD(num_features=5, num_clusters=3, momentum=0.1).double()).eval()
    frames = torch.randn(1, 4, 5, generator=rng, dtype=torch.float64)
    weights = torch.tensor([[[1.0, 2.0, 0.0, 1.0]]])

    described = layer.describe(frames, weights[:, 0])

    assignment = layer.assignment(frames, weights[:, 0])[0]
    differences = frames[0].unsqueeze(1) - layer.centres  # (T, K, D)
    paper = (weights[0, 0].reshape(4, 1, 1) * assignment.unsqueeze(-1) * differences).sum(dim=0)
    torch.testing.assert_close(layer.residuals(described, weights)[0, 0], paper)


def test_centres_start_apart_from_the_assignment_with_the_scale_of_the_features():
    torch.manual_seed(0)
    layer = NetVLAD(num_features=400, num_clusters=300, momentum=0.1)

    assert abs(layer.centres.std().item() * sqrt(400) - 1) < 0.02
    assert not torch.allclose(layer.centres, layer.assignment.weight.T)
    assert layer.projection_fan_in == 300
