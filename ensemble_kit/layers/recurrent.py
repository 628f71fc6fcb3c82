"""Recurrent pooling: arXiv:1706.06905, sections 4 and 5.2; arXiv:1810.00207, section 2.4.

Bidirectional stacks and attention are those of S3 (Zhao, 2018), which has no numbered sections:
"Long Short-Term Memory", "Bi-LSTM", "Bi-GRU" and "Attention".
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

# Gates in PyTorch's order -> ONNX's order: GRU r, z, c -> z, r, c; LSTM i, f, g, o -> i, o, f, g.
Cell: TypeAlias = Literal["gru", "lstm"]
ONNX_GATES = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
ONNX_KINDS = {
    "weight_ih": ("weight_ih",),
    "weight_hh": ("weight_hh",),
    "bias": ("bias_ih", "bias_hh"),
}


class Recurrence(nn.Module):
    """A stack of gated recurrent units or long short-term memories, read to each video's length.

    GRU::

        r = sigmoid(Wr x + Ur h + br),   z = sigmoid(Wz x + Uz h + bz)
        n = tanh(Wn x + bn + r * (Un h + dn)),   h' = (1 - z) * n + z * h

    LSTM::

        i, f, o = sigmoid(W x + U h + b),   g = tanh(Wg x + Ug h + bg)
        c' = f * c + i * g,   h' = o * tanh(c')

    The cells are those of PyTorch and cuDNN, for the speed of their kernels. The GRU applies the
    reset gate after the recurrent product, where the papers' TensorFlow cell computes ``Un (r *
    h)``. Each cell has a second bias, which TensorFlow's cells do not have. The LSTM has no
    peepholes: S3 prints them, but its code does not have them. Weights start as in TensorFlow:
    kernels Glorot uniform, the GRU's gate biases and the LSTM's forget bias 1, other biases 0.

    Args:
        cell: ``gru`` or ``lstm``.
        num_features: D, the size of one frame's feature vector.
        hidden_size: H, the size of one layer's state in one direction.
        num_layers: L, layers stacked.
        is_bidirectional: Whether each layer also reads backwards, from a video's last frame.

    Shape:
        - frames: ``(B, T, D)``, floating point, in order.
        - num_frames: ``(B,)``, integers in [0, T]; padding beyond it changes nothing.
        - outputs: ``(B, T, H)`` of the top layer (2 * H where bidirectional), 0 in padding.
        - states: ``(B, H)`` each, the final states by layer; forward before backward, and for the
          LSTM c before h. Zeros for a video of no frames.
    """

    def __init__(
        self,
        *,
        cell: Cell,
        num_features: int,
        hidden_size: int,
        num_layers: int,
        is_bidirectional: bool,
    ) -> None:
        super().__init__()
        self.cell: Cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_directions = 2 if is_bidirectional else 1
        self.onnx: nn.ParameterDict | None = None
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.cells = kind(
            num_features, hidden_size, num_layers, batch_first=True, bidirectional=is_bidirectional
        )
        self._initialise()

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Return the top layer's outputs and, for each layer, its final states."""
        lengths = num_frames.clamp(min=1)  # neither PyTorch nor ONNX takes a sequence of no steps
        has_frames = (num_frames > 0).unsqueeze(1)
        run = self._run_in_onnx if torch.onnx.is_in_onnx_export() else self._run
        outputs, layers = run(frames, lengths)
        zero = torch.zeros((), dtype=frames.dtype)
        return (
            torch.where(has_frames.unsqueeze(2), outputs, zero),
            [[torch.where(has_frames, state, zero) for state in states] for states in layers],
        )

    def _run(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        packed = pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, states = self.cells(packed)
        padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=frames.shape[1])
        kinds = [states] if self.cell == "gru" else [states[1], states[0]]  # c before h
        rows = range(0, self.num_layers * self.num_directions, self.num_directions)
        return padded, [
            [kind[row + direction] for direction in range(self.num_directions) for kind in kinds]
            for row in rows
        ]

    def arrange_for_onnx(self) -> None:
        """Replace the cells by their weights in ONNX's order, which only an export can run.

        The graph then reorders nothing, and the file holds each weight once.
        """
        with torch.no_grad():
            self.onnx = nn.ParameterDict()
            for layer in range(self.num_layers):
                for suffix in self._suffixes(layer):
                    for kind, parts in ONNX_KINDS.items():
                        tensors = [self.cells.get_parameter(part + suffix) for part in parts]
                        self.onnx[kind + suffix] = arranged_for_onnx(self.cell, tensors)
        del self.cells

    def _run_in_onnx(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Write ONNX's cells, which take sequence lengths, in place of a packed sequence."""
        assert self.onnx is not None
        sequence = frames.transpose(0, 1)  # ONNX wants (T, B, D)
        steps, batch = sequence.shape[0], sequence.shape[1]
        directions, hidden = self.num_directions, self.hidden_size
        shapes = [(steps, directions, batch, hidden)] + [(directions, batch, hidden)] * (
            1 if self.cell == "gru" else 2
        )
        attributes: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "forward" if directions == 1 else "bidirectional",
        }
        if self.cell == "gru":
            attributes["linear_before_reset"] = 1  # the reset gate comes after the product
        layers = []
        for layer in range(self.num_layers):
            weights = [
                torch.cat(parts) if directions > 1 else parts[0]
                for kind in ONNX_KINDS
                for parts in [[self.onnx[f"{kind}{suffix}"] for suffix in self._suffixes(layer)]]
            ]
            outputs, *states = torch.onnx.ops.symbolic_multi_out(
                self.cell.upper(),
                (sequence, *weights, lengths.to(torch.int32)),
                attrs=attributes,
                dtypes=(frames.dtype,) * len(shapes),
                shapes=shapes,
                version=20,
            )
            kinds = states[::-1]  # ONNX gives h, then c
            layers.append([kind[d] for d in range(directions) for kind in kinds])
            # (T, directions, B, H) -> (T, B, directions * H)
            sequence = outputs.squeeze(1) if directions == 1 else outputs.transpose(1, 2).flatten(2)
        return sequence.transpose(0, 1), layers

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.num_directions]

    def _initialise(self) -> None:
        hidden = self.hidden_size
        num_gates = len(ONNX_GATES[self.cell])
        for name, parameter in self.cells.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):
                    biased = (
                        slice(0, 2 * hidden) if self.cell == "gru" else slice(hidden, 2 * hidden)
                    )
                    nn.init.ones_(parameter[biased])
                continue
            layer = int(name.split("_l")[-1].removesuffix("_reverse"))
            width = self.cells.input_size if layer == 0 else hidden * self.num_directions
            if self.cell == "lstm":
                limit = sqrt(6 / (width + hidden + num_gates * hidden))
                nn.init.uniform_(parameter, -limit, limit)
                continue
            gates, candidate = parameter[: 2 * hidden], parameter[2 * hidden :]
            gate_limit = sqrt(6 / (width + hidden + 2 * hidden))
            nn.init.uniform_(gates, -gate_limit, gate_limit)
            candidate_limit = sqrt(6 / (width + hidden + hidden))
            nn.init.uniform_(candidate, -candidate_limit, candidate_limit)


def arranged_for_onnx(cell: Cell, tensors: Sequence[Tensor]) -> Tensor:
    """Return ONNX's W, R or B of one layer and direction.

    Args:
        cell: ``gru`` or ``lstm``.
        tensors: PyTorch's tensors for it, by ``ONNX_KINDS``: two biases where ONNX has one. Any
            tensors will do that have the gates in their first dimension.

    Returns:
        ``(1, ...)``, with the gates in ONNX's order.
    """
    order = ONNX_GATES[cell]
    reordered = []
    for tensor in tensors:
        gates = tensor.chunk(len(order))
        reordered += [gates[index] for index in order]
    return torch.cat(reordered).unsqueeze(0)


class RecurrentPooling(nn.Module):
    """The final states of a recurrent stack.

    Args:
        cell: ``gru`` or ``lstm``.
        num_features: D, the size of one frame's feature vector.
        hidden_size: H, the size of one layer's state in one direction.
        num_layers: L, layers stacked.
        is_bidirectional: Whether each layer also reads backwards.
        state: ``all`` returns the final states of all layers, as S2 and S5 ran them (for the LSTM
            c and h of each: 2 * L * H); ``last`` the top layer's h.

    Shape:
        - frames: ``(B, T, D)``, floating point, in order.
        - num_frames: ``(B,)``, integers in [0, T]; padding beyond it changes nothing.
        - output: ``(B, output_size)``; zeros for a video of no frames.
    """

    def __init__(
        self,
        *,
        cell: Cell,
        num_features: int,
        hidden_size: int,
        num_layers: int,
        is_bidirectional: bool,
        state: Literal["all", "last"],
    ) -> None:
        super().__init__()
        self.recurrence = Recurrence(
            cell=cell,
            num_features=num_features,
            hidden_size=hidden_size,
            num_layers=num_layers,
            is_bidirectional=is_bidirectional,
        )
        self.state = state
        self.num_kinds = 1 if cell == "gru" else 2  # c and h
        size = hidden_size * self.recurrence.num_directions
        self.output_size = size * (num_layers * self.num_kinds if state == "all" else 1)
        self.projection_fan_in = self.output_size

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """Return the final states, side by side."""
        _, layers = self.recurrence(frames, num_frames)
        if self.state == "all":
            return torch.cat([state for states in layers for state in states], dim=-1)
        return torch.cat(layers[-1][self.num_kinds - 1 :: self.num_kinds], dim=-1)


class AttentionBiGRU(nn.Module):
    """Attention over the outputs of a bidirectional GRU (Yang et al., 2016; S3, "Attention").

    ::

        x_t = We f_t,   h_t = [GRU forward, GRU backward]_t
        u_t = tanh(Ww h_t + bw),   alpha = softmax_t(u_t . uw) over the video's frames
        output = sum_t alpha_t h_t

    S3 gives no sizes. We, Ww and uw start Glorot normal, as in Yang et al.

    Args:
        num_features: D, the size of one frame's feature vector.
        embedding_size: The width of x.
        hidden_size: H, the GRU's state in one direction.
        num_layers: L, layers stacked.
        attention_size: The width of u.

    Shape:
        - frames: ``(B, T, D)``, floating point, in order.
        - num_frames: ``(B,)``, integers in [0, T]; padding beyond it changes nothing.
        - output: ``(B, 2 * H)``; zeros for a video of no frames.
    """

    def __init__(
        self,
        *,
        num_features: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        attention_size: int,
    ) -> None:
        super().__init__()
        self.output_size = 2 * hidden_size
        self.projection_fan_in = self.output_size
        self.embedding = nn.Linear(num_features, embedding_size, bias=False)
        self.recurrence = Recurrence(
            cell="gru",
            num_features=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            is_bidirectional=True,
        )
        self.attention = nn.Linear(2 * hidden_size, attention_size)
        self.context = nn.Linear(attention_size, 1, bias=False)
        for layer in (self.embedding, self.attention, self.context):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.attention.bias)

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """Return the attended mean of the outputs."""
        outputs, _ = self.recurrence(self.embedding(frames), num_frames)
        logits = self.context(self.attention(outputs).tanh()).squeeze(-1)  # (B, T)
        positions = torch.arange(frames.shape[1], device=frames.device)
        # a video of no frames attends to its first row, whose output is 0
        is_frame = positions < num_frames.clamp(min=1).unsqueeze(1)
        attention = logits.masked_fill(~is_frame, float("-inf")).softmax(dim=-1)
        attended: Tensor = attention.unsqueeze(1) @ outputs
        return attended.squeeze(1)
