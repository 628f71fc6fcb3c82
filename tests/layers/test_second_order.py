import pytest
import torch
from builders import stir
from poolings import build, pool, repeated
from reference import product_loops, residual_moments_loops, whitened_loops
from torch.utils._python_dispatch import TorchDispatchMode

from ensemble_kit.layers.second_order import SecondOrder, WhitenedResiduals

COUNTS = [[[1, 0, 2, 3, 0], [1, 1, 1, 1, 1]], [[2, 1, 0, 0, 0], [0, 3, 0, 1, 0]]]


def whitened(order, *, num_features=3, num_clusters=4, momentum=0.1):
    torch.manual_seed(0)
    layer = WhitenedResiduals(
        num_features=num_features, num_clusters=num_clusters, order=order, momentum=momentum
    )
    return stir(layer.double())


def inputs(rng, *, batch=2, length=5, num_features=3, num_clusters=4):
    """Frames that need a gradient, and assignments."""
    frames = torch.randn(batch, length, num_features, generator=rng, dtype=torch.float64)
    logits = torch.randn(batch, length, num_clusters, generator=rng, dtype=torch.float64)
    return frames.requires_grad_(), logits.softmax(dim=-1)


def moments(rows, centres, order):
    """Means and variances of all clusters by loops."""
    pairs = [residual_moments_loops(rows, centre, order) for centre in centres]
    return [mean for mean, _ in pairs], [variance for _, variance in pairs]


class Sizes(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr():
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 8)
        return made


@pytest.mark.parametrize("order", [1, 2])
def test_matches_the_paper_equation_in_evaluation(order, rng):
    layer = whitened(order).eval()
    frames, assignment = inputs(rng)
    counts = torch.tensor(COUNTS)

    ours = layer.aggregate(layer.describe(frames, assignment, counts[:, 0]), counts)

    assert ours.shape == (2, 2, 4, 3**order)
    for video in range(2):
        for repeat in range(2):
            paper = whitened_loops(
                repeated(frames[video].tolist(), COUNTS[video][repeat]),
                repeated(assignment[video].tolist(), COUNTS[video][repeat]),
                layer.centres.tolist(),
                layer.running_mean.tolist(),
                layer.running_variance.tolist(),
                order,
            )
            torch.testing.assert_close(ours[video, repeat].tolist(), paper)


@pytest.mark.parametrize("order", [1, 2])
def test_training_whitens_with_the_statistics_of_all_residuals_of_the_batch(order, rng):
    layer = whitened(order, momentum=0.25)
    before = layer.running_mean.clone(), layer.running_variance.clone()
    frames, assignment = inputs(rng)
    counts = torch.tensor(COUNTS)[:, :1]

    ours = layer.aggregate(layer.describe(frames, assignment, counts[:, 0]), counts)

    rows = [row for v in range(2) for row in repeated(frames[v].tolist(), COUNTS[v][0])]
    means, variances = moments(rows, layer.centres.tolist(), order)
    for video in range(2):
        paper = whitened_loops(
            repeated(frames[video].tolist(), COUNTS[video][0]),
            repeated(assignment[video].tolist(), COUNTS[video][0]),
            layer.centres.tolist(),
            means,
            variances,
            order,
        )
        torch.testing.assert_close(ours[video, 0].tolist(), paper)
    for statistic, old, new in zip(
        (layer.running_mean, layer.running_variance), before, (means, variances), strict=True
    ):
        paper = 0.75 * old + 0.25 * torch.tensor(new, dtype=torch.float64)
        torch.testing.assert_close(statistic, paper)


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_pass_through_the_statistics_of_the_batch(order, rng):
    layer = whitened(order, num_clusters=2)
    frames, assignment = inputs(rng, num_clusters=2)
    counts = torch.tensor(COUNTS)[:, :1]

    def whiten(frames, _):  # the check moves the centres where they are
        return layer.aggregate(layer.describe(frames, assignment, counts[:, 0]), counts)

    assert torch.autograd.gradcheck(whiten, (frames, layer.centres))


def test_both_branches_stand_side_by_side(rng):
    layer = build("second_order").eval()
    frames = torch.randn(2, 5, 5, generator=rng, dtype=torch.float64)

    ours = pool(layer, frames, torch.tensor(COUNTS))

    reduced = [
        [product_loops(row, layer.projection.tolist()) for row in v] for v in frames.tolist()
    ]
    streams = frames.tolist(), reduced
    for video in range(2):
        for repeat in range(2):
            paper = []
            for branch, assigner, stream in zip(
                layer.branches, layer.assignments, streams, strict=True
            ):
                rows = torch.tensor(stream, dtype=torch.float64)
                assignment = assigner(rows, torch.ones(2, 5))[video].tolist()
                clusters = whitened_loops(
                    repeated(stream[video], COUNTS[video][repeat]),
                    repeated(assignment, COUNTS[video][repeat]),
                    branch.centres.tolist(),
                    branch.running_mean.tolist(),
                    branch.running_variance.tolist(),
                    branch.order,
                )
                paper += [x for cluster in clusters for x in cluster]
            torch.testing.assert_close(ours[video, repeat].tolist(), paper)
    assert ours.shape[-1] == layer.output_size == 3 * (5 + 2**2)


def test_the_branches_have_centres_and_assignments_of_their_own():
    layer = SecondOrder(num_features=6, num_clusters=3, reduced_size=2, momentum=0.1)

    assert [tuple(branch.centres.shape) for branch in layer.branches] == [(3, 6), (3, 2)]
    assert [tuple(one.weight.shape) for one in layer.assignments] == [(6, 3), (2, 3)]
    assert layer.projection_fan_in == 3


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("is_training", [False, True])
def test_a_frame_on_a_centre_is_finite(order, is_training, rng):
    layer = whitened(order).train(is_training)
    frames = layer.centres.detach()[1].repeat(1, 5, 1).requires_grad_()
    _, assignment = inputs(rng, batch=1)
    weights = torch.ones(1, 1, 5)

    ours = layer.aggregate(layer.describe(frames, assignment, weights[:, 0]), weights)
    ours.sum().backward()

    assert ours.isfinite().all()
    assert frames.grad.isfinite().all()
    assert layer.centres.grad.isfinite().all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("is_training", [False, True])
def test_no_tensor_is_as_large_as_all_residuals(order, is_training, rng):
    layer = whitened(order, num_features=8, num_clusters=16).train(is_training)
    frames, assignment = inputs(rng, length=40, num_features=8, num_clusters=16)
    weights = torch.ones(2, 1 if is_training else 3, 40, dtype=torch.float64)

    with Sizes() as sizes:
        described = layer.describe(frames, assignment, weights[:, 0])
        layer.aggregate(described, weights).sum().backward()

    assert 2 * 40 * 8 < sizes.largest < 2 * 40 * 16 * 8


@pytest.mark.parametrize("order", [1, 2])
def test_training_keeps_no_residuals_of_single_clusters_for_the_backward_pass(order, rng):
    kept = {}
    for num_clusters in (16, 24):
        layer = whitened(order, num_features=8, num_clusters=num_clusters)
        frames, assignment = inputs(rng, length=300, num_features=8, num_clusters=num_clusters)
        weights = torch.ones(2, 1, 300, dtype=torch.float64)
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer.aggregate(layer.describe(frames, assignment, weights[:, 0]), weights)
        kept[num_clusters] = sum(storages.values())
        del output

    assert (kept[24] - kept[16]) / 8 < 2 * 300 * 8  # less than B * T * D a cluster


@pytest.mark.parametrize("order", [1, 2])
def test_without_momentum_the_statistics_are_the_mean_over_batches_since_the_reset(order, rng):
    layer = whitened(order, momentum=None)
    batches = [inputs(rng) for _ in range(4)]
    weights = torch.ones(2, 5)
    layer.describe(*batches[0], weights)

    layer.reset_statistics()
    assert layer.running_mean.count_nonzero() == 0
    assert (layer.running_variance == 1).all()
    for batch in batches[1:]:
        layer.describe(*batch, weights)

    pairs = [
        moments(frames.flatten(0, 1).tolist(), layer.centres.tolist(), order)
        for frames, _ in batches[1:]
    ]
    for statistic, column in zip(
        (layer.running_mean, layer.running_variance), zip(*pairs, strict=True), strict=True
    ):
        paper = torch.tensor(column, dtype=torch.float64).mean(dim=0)
        torch.testing.assert_close(statistic, paper)


@pytest.mark.parametrize("order", [1, 2])
def test_evaluation_changes_no_statistics_and_padding_never_counts(order, rng):
    layer, padded = whitened(order), whitened(order)
    frames, assignment = inputs(rng)
    filler = 10 * torch.ones(2, 2, 3, dtype=torch.float64), torch.ones(2, 2, 4).double() / 4
    before = layer.running_mean.clone()

    layer.eval().describe(frames, assignment, torch.ones(2, 5))
    assert torch.equal(layer.running_mean, before)
    layer.train().describe(frames, assignment, torch.ones(2, 5))
    padded.describe(
        torch.cat([frames, filler[0]], dim=1),
        torch.cat([assignment, filler[1]], dim=1),
        torch.tensor([[1.0] * 5 + [0.0] * 2] * 2),
    )

    torch.testing.assert_close(padded.running_mean, layer.running_mean)
    torch.testing.assert_close(padded.running_variance, layer.running_variance)


@pytest.mark.parametrize("order", [1, 2])
def test_a_batch_of_no_frames_or_of_one_is_finite(order, rng):
    for weights in (torch.zeros(2, 1, 5), torch.eye(5)[:2].unsqueeze(1)):
        layer = whitened(order)
        frames, assignment = inputs(rng)

        output = layer.aggregate(layer.describe(frames, assignment, weights[:, 0]), weights)
        output.sum().backward()

        assert output.isfinite().all()
        assert layer.running_mean.isfinite().all()
        assert layer.running_variance.isfinite().all()
        assert layer.centres.grad.isfinite().all()
