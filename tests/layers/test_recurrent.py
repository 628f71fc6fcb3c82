from math import sqrt

import pytest
import torch
from reference import gru_loops

from ensemble_kit.layers.recurrent import GRU

LENGTHS = [6, 3, 1]


def build(*, num_layers=2, state="all"):
    torch.manual_seed(0)
    layer = GRU(num_features=5, hidden_size=3, num_layers=num_layers, state=state).double()
    for parameter in layer.parameters():
        parameter.data.normal_()  # the second biases start at 0 and would hide a mistake
    return layer


def weights_of(layer):
    return [
        tuple(
            getattr(layer.cells, f"{name}_l{index}").tolist()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        for index in range(layer.cells.num_layers)
    ]


@pytest.fixture
def frames(rng):
    return torch.randn(3, 6, 5, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_matches_the_cell_equations_up_to_the_last_frame(num_layers, frames):
    layer = build(num_layers=num_layers)

    ours = layer(frames, torch.tensor(LENGTHS))

    for video, length in enumerate(LENGTHS):
        states = gru_loops(frames[video, :length].tolist(), weights_of(layer))
        torch.testing.assert_close(ours[video].tolist(), [x for state in states for x in state])
    assert ours.shape == (3, layer.output_size) == (3, 3 * num_layers)


def test_last_is_the_top_layers_state(frames):
    everything, last = build(state="all"), build(state="last")

    top = last(frames, torch.tensor(LENGTHS))

    torch.testing.assert_close(top, everything(frames, torch.tensor(LENGTHS))[:, 3:])
    assert last.output_size == last.projection_fan_in == 3


def test_padding_and_the_batch_change_nothing(frames, rng):
    layer = build()
    together = layer(frames, torch.tensor(LENGTHS))
    noise = torch.randn(3, 2, 5, generator=rng, dtype=torch.float64)

    longer = layer(torch.cat([frames, noise], dim=1), torch.tensor(LENGTHS))

    torch.testing.assert_close(longer, together)
    for video, length in enumerate(LENGTHS):
        alone = layer(frames[video : video + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(together[video : video + 1], alone)


def test_the_order_of_frames_matters(frames):
    layer = build()

    forward = layer(frames, torch.tensor([6, 6, 6]))
    backward = layer(frames.flip(1), torch.tensor([6, 6, 6]))

    assert not torch.allclose(forward, backward)


def test_a_video_of_no_frames_has_state_zero(frames):
    states = build()(frames, torch.tensor([6, 0, 1]))

    assert states[1].count_nonzero() == 0
    assert states.isfinite().all()


def test_gradients_reach_every_parameter(frames, rng):
    layer = build()
    states = layer(frames, torch.tensor(LENGTHS))

    (states * torch.randn(states.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_starts_as_the_papers_cell_does():
    torch.manual_seed(0)
    cells = GRU(num_features=300, hidden_size=100, num_layers=2, state="all").cells

    for layer, width in enumerate([300, 100]):
        # TensorFlow keeps [x, h] -> 2H of the gates and [x, h] -> H of the candidate as one kernel
        gates = sqrt(6 / (width + 100 + 200))
        candidate = sqrt(6 / (width + 100 + 100))
        for name in ("weight_ih", "weight_hh"):
            weight = getattr(cells, f"{name}_l{layer}")
            assert 0.99 * gates < weight[:200].abs().max() <= gates
            assert 0.99 * candidate < weight[200:].abs().max() <= candidate
            assert abs(weight[:200].std() * sqrt(3) / gates - 1) < 0.02
        assert getattr(cells, f"bias_ih_l{layer}").tolist() == [1.0] * 200 + [0.0] * 100
        assert getattr(cells, f"bias_hh_l{layer}").tolist() == [0.0] * 300
