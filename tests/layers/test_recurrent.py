from math import sqrt

import pytest
import torch
from reference import attend_loops, gru_loops, lstm_loops, product_loops, recurrence_loops
from torch import nn

from ensemble_kit.layers.recurrent import AttentionBiGRU, Recurrence, RecurrentPooling

LENGTHS = [6, 3, 1]
STEPS = {"gru": (gru_loops, 1), "lstm": (lstm_loops, 2)}  # and how many states a cell has
STACKS = [
    (cell, layers, both)
    for cell, most in (("gru", 3), ("lstm", 2))
    for layers in range(1, most + 1)
    for both in (False, True)
]


def build(*, cell="gru", num_layers=2, is_bidirectional=False, state="all"):
    torch.manual_seed(0)
    return randomised(
        RecurrentPooling(
            cell=cell,
            num_features=5,
            hidden_size=3,
            num_layers=num_layers,
            is_bidirectional=is_bidirectional,
            state=state,
        )
    )


def randomised(layer):
    for parameter in layer.parameters():
        parameter.data.normal_()  # most biases start at 0 and would hide a mistake
    return layer.double()


def weights_of(recurrence):
    cells = recurrence.cells
    return [
        [
            tuple(
                getattr(cells, f"{name}_l{layer}{suffix}").tolist()
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            for suffix in ("", "_reverse")[: recurrence.num_directions]
        ]
        for layer in range(cells.num_layers)
    ]


def joined(states):
    return [x for state in states for x in state]


@pytest.fixture
def frames(rng):
    return torch.randn(3, 6, 5, generator=rng, dtype=torch.float64)


@pytest.fixture
def num_frames():
    return torch.tensor(LENGTHS)


@pytest.fixture(params=STACKS, ids=lambda stack: f"{stack[0]}-{stack[1]}{'-both' * stack[2]}")
def stack(request):
    cell, num_layers, is_bidirectional = request.param
    return build(cell=cell, num_layers=num_layers, is_bidirectional=is_bidirectional)


def test_states_and_outputs_match_the_cell_equations_up_to_the_last_frame(
    stack, frames, num_frames
):
    recurrence = stack.recurrence
    outputs, layers = recurrence(frames, num_frames)
    everything = stack(frames, num_frames)

    for video, length in enumerate(LENGTHS):
        expected, finals = recurrence_loops(
            frames[video, :length].tolist(), weights_of(recurrence), *STEPS[recurrence.cell]
        )
        torch.testing.assert_close(outputs[video, :length].tolist(), expected)
        states = [state[video].tolist() for states in layers for state in states]
        torch.testing.assert_close(states, finals)
        torch.testing.assert_close(everything[video].tolist(), joined(finals))
        assert outputs[video, length:].count_nonzero() == 0
    assert everything.shape == (3, stack.output_size)
    assert stack.output_size == stack.projection_fan_in == len(joined(finals))


@pytest.mark.parametrize(("cell", "num_kinds"), [("gru", 1), ("lstm", 2)])
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_last_is_h_of_the_top_layer(cell, num_kinds, is_bidirectional, frames, num_frames):
    last = build(cell=cell, is_bidirectional=is_bidirectional, state="last")

    top = last(frames, num_frames)

    directions = 2 if is_bidirectional else 1
    for video, length in enumerate(LENGTHS):
        _, finals = recurrence_loops(
            frames[video, :length].tolist(), weights_of(last.recurrence), *STEPS[cell]
        )
        of_the_top = finals[-directions * num_kinds :][num_kinds - 1 :: num_kinds]
        torch.testing.assert_close(top[video].tolist(), joined(of_the_top))
    assert last.output_size == last.projection_fan_in == top.shape[1] == 3 * directions


def test_a_layer_of_both_directions_starts_backwards_at_the_last_frame(frames, num_frames):
    both = build(num_layers=1, is_bidirectional=True)
    forward = build(num_layers=1)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        backward = getattr(both.recurrence.cells, f"{name}_l0_reverse")
        getattr(forward.recurrence.cells, f"{name}_l0").data.copy_(backward)

    states = both(frames, num_frames)[:, 3:]

    for video, length in enumerate(LENGTHS):
        turned = frames[video : video + 1, :length].flip(1)
        alone = forward(turned, torch.tensor([length]))
        torch.testing.assert_close(states[video : video + 1], alone)


def test_padding_and_the_batch_change_nothing(stack, frames, num_frames, rng):
    together = stack(frames, num_frames)
    noise = torch.randn(3, 2, 5, generator=rng, dtype=torch.float64)
    spoilt = torch.cat([frames, noise], dim=1)
    spoilt[1, 3:], spoilt[2, 1:] = torch.nan, 1e9

    torch.testing.assert_close(stack(spoilt, num_frames), together)
    for video, length in enumerate(LENGTHS):
        alone = stack(frames[video : video + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(together[video : video + 1], alone)


def test_the_order_of_frames_matters(stack, frames):
    forward = stack(frames, torch.tensor([6, 6, 6]))
    backward = stack(frames.flip(1), torch.tensor([6, 6, 6]))

    assert not torch.allclose(forward, backward)


def test_a_video_of_no_frames_has_states_and_outputs_zero(stack, frames):
    num_frames = torch.tensor([6, 0, 1])

    outputs, _ = stack.recurrence(frames, num_frames)
    states = stack(frames, num_frames)

    assert states[1].count_nonzero() == outputs[1].count_nonzero() == 0
    assert states.isfinite().all()
    assert states[0].all()


def test_gradients_reach_every_parameter(stack, frames, num_frames, rng):
    states = stack(frames, num_frames)

    (states * torch.randn(states.shape, generator=rng)).sum().backward()

    for name, parameter in stack.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def started(cell, *, num_features=300, hidden_size=100):
    torch.manual_seed(0)
    return Recurrence(
        cell=cell,
        num_features=num_features,
        hidden_size=hidden_size,
        num_layers=2,
        is_bidirectional=True,
    ).cells


LAYERS = [("l0", 300), ("l0_reverse", 300), ("l1", 200), ("l1_reverse", 200)]  # and its input


def assert_uniform(weight, limit):
    assert 0.99 * limit < weight.abs().max() <= limit
    assert abs(weight.std() * sqrt(3) / limit - 1) < 0.02


@pytest.mark.parametrize(("layer", "width"), LAYERS)
def test_the_gru_starts_as_the_papers_cell_does(layer, width):
    cells = started("gru")

    # TensorFlow keeps [x, h] -> 2H of the gates and [x, h] -> H of the candidate as one kernel
    for name in ("weight_ih", "weight_hh"):
        weight = getattr(cells, f"{name}_{layer}")
        assert_uniform(weight[:200], sqrt(6 / (width + 100 + 200)))
        assert_uniform(weight[200:], sqrt(6 / (width + 100 + 100)))
    assert getattr(cells, f"bias_ih_{layer}").tolist() == [1.0] * 200 + [0.0] * 100
    assert getattr(cells, f"bias_hh_{layer}").tolist() == [0.0] * 300


@pytest.mark.parametrize(("layer", "width"), LAYERS)
def test_the_lstm_starts_as_the_papers_cell_does(layer, width):
    cells = started("lstm")

    # TensorFlow keeps [x, h] -> 4H as one kernel, and adds 1 to the forget gate's logits
    for name in ("weight_ih", "weight_hh"):
        assert_uniform(getattr(cells, f"{name}_{layer}"), sqrt(6 / (width + 100 + 400)))
    forget_bias = [0.0] * 100 + [1.0] * 100 + [0.0] * 200
    assert getattr(cells, f"bias_ih_{layer}").tolist() == forget_bias
    assert getattr(cells, f"bias_hh_{layer}").tolist() == [0.0] * 400


def attention_bigru():
    torch.manual_seed(0)
    return AttentionBiGRU(
        num_features=5, embedding_size=4, hidden_size=3, num_layers=2, attention_size=2
    )


def test_attention_over_outputs_matches_the_papers_equations(frames, num_frames):
    layer = randomised(attention_bigru())

    ours = layer(frames, num_frames)

    for video, length in enumerate(LENGTHS):
        embedded = [
            product_loops(frame, layer.embedding.weight.T.tolist())
            for frame in frames[video, :length].tolist()
        ]
        outputs, _ = recurrence_loops(embedded, weights_of(layer.recurrence), gru_loops, 1)
        paper = attend_loops(
            outputs,
            layer.attention.weight.T.tolist(),
            layer.attention.bias.tolist(),
            layer.context.weight[0].tolist(),
        )
        torch.testing.assert_close(ours[video].tolist(), paper)
    assert ours.shape == (3, layer.output_size) == (3, layer.projection_fan_in) == (3, 6)


def test_attention_over_outputs_never_sees_padding(frames, num_frames, rng):
    layer = randomised(attention_bigru())
    together = layer(frames, num_frames)
    spoilt = torch.cat([frames, 1e3 * torch.randn(3, 4, 5, generator=rng).double()], dim=1)
    spoilt[1, 3:] = torch.nan

    torch.testing.assert_close(layer(spoilt, num_frames), together)


def test_attention_over_the_outputs_of_no_frames_is_zero(frames):
    layer = randomised(attention_bigru())

    ours = layer(frames, torch.tensor([6, 0, 1]))

    assert ours[1].count_nonzero() == 0
    assert ours.isfinite().all()


def test_gradients_reach_every_parameter_of_the_attention(frames, num_frames, rng):
    layer = randomised(attention_bigru())
    attended = layer(frames, num_frames)

    (attended * torch.randn(attended.shape, generator=rng)).sum().backward()

    for name, parameter in layer.named_parameters():
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_the_attention_starts_glorot_normal():
    torch.manual_seed(0)
    layer = AttentionBiGRU(
        num_features=300, embedding_size=200, hidden_size=50, num_layers=1, attention_size=150
    )

    for part in (layer.embedding, layer.attention, layer.context):
        deviation = sqrt(2 / (part.in_features + part.out_features))
        sampled = part.weight.std().item() / deviation
        assert abs(sampled - 1) < 4 / sqrt(2 * part.weight.numel())  # four standard errors
    assert layer.attention.bias.count_nonzero() == 0
    assert isinstance(layer.embedding, nn.Linear)
    assert layer.embedding.bias is layer.context.bias is None
