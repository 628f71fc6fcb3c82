"""Recurrent pooling: arXiv:1706.06905, section 3; arXiv:1810.00207, section 2.4."""

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class GRU(nn.Module):
    """The final state of a stack of gated recurrent units, read to each video's last frame.

    ::

        r = sigmoid(Wr x + Ur h + br),   z = sigmoid(Wz x + Uz h + bz)
        c = tanh(Wc x + bc + r * (Uc h + dc)),   h' = (1 - z) * c + z * h

    The cell is PyTorch's and cuDNN's, for the speed of its kernels. It applies the reset gate after
    the recurrent product, where the papers' TensorFlow cell computes ``Uc (r * h)``, and has a
    second bias (7,200 more parameters in two layers of 1,200). Starts as TensorFlow's cell does:
    Glorot uniform kernels, gate biases 1, other biases 0.

    Args:
        num_features: D, the size of one frame's feature vector.
        hidden_size: H, the size of one layer's state.
        num_layers: L, layers stacked.
        state: ``all`` returns the final states of all layers (L * H), as S2 and S5 ran it;
            ``last`` the top layer's (H).

    Shape:
        - frames: ``(B, T, D)``, floating point, in order.
        - num_frames: ``(B,)``, integers in [0, T]; padding beyond it changes nothing.
        - output: ``(B, L * H)`` or ``(B, H)``; zeros for a video of no frames.
    """

    def __init__(
        self,
        *,
        num_features: int,
        hidden_size: int,
        num_layers: int,
        state: Literal["all", "last"],
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.state = state
        self.output_size = hidden_size * (num_layers if state == "all" else 1)
        self.projection_fan_in = self.output_size
        self.cells = nn.GRU(num_features, hidden_size, num_layers, batch_first=True)
        self._initialise()

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """Return the final states."""
        lengths = num_frames.clamp(min=1)  # neither form takes a sequence of no steps
        if torch.onnx.is_in_onnx_export():
            states = self._onnx_states(frames, lengths)
        else:
            packed = pack_padded_sequence(
                frames, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            states = list(self.cells(packed)[1])
        final = torch.cat(states, dim=-1) if self.state == "all" else states[-1]
        return torch.where(num_frames.unsqueeze(1) > 0, final, torch.zeros((), dtype=final.dtype))

    def _onnx_states(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        """Write ONNX's own GRU, which knows sequence lengths, in place of a packed sequence.

        ``linear_before_reset=1`` is this cell's place of the reset gate. ONNX orders the gates
        z, r, c where PyTorch orders them r, z, c.
        """
        sequence = frames.transpose(0, 1)  # ONNX wants (T, B, D)
        states = []
        for layer in range(self.cells.num_layers):
            weights = [
                self._reordered(getattr(self.cells, f"{name}_l{layer}"))
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            steps, batch = sequence.shape[0], sequence.shape[1]
            outputs, final = torch.onnx.ops.symbolic_multi_out(
                "GRU",
                (
                    sequence,
                    weights[0].unsqueeze(0),
                    weights[1].unsqueeze(0),
                    torch.cat(weights[2:]).unsqueeze(0),
                    lengths.to(torch.int32),
                ),
                attrs={"hidden_size": self.hidden_size, "linear_before_reset": 1},
                dtypes=(frames.dtype, frames.dtype),
                shapes=((steps, 1, batch, self.hidden_size), (1, batch, self.hidden_size)),
                version=20,
            )
            sequence = outputs.squeeze(1)
            states.append(final.squeeze(0))
        return states

    @staticmethod
    def _reordered(gates: Tensor) -> Tensor:
        reset, update, candidate = gates.chunk(3)
        return torch.cat([update, reset, candidate])

    def _initialise(self) -> None:
        hidden = self.hidden_size
        for layer in range(self.cells.num_layers):
            width = self.cells.input_size if layer == 0 else hidden
            gate_limit = sqrt(6 / (width + hidden + 2 * hidden))
            candidate_limit = sqrt(6 / (width + hidden + hidden))
            for name in ("weight_ih", "weight_hh"):
                weight = getattr(self.cells, f"{name}_l{layer}")
                nn.init.uniform_(weight[: 2 * hidden], -gate_limit, gate_limit)
                nn.init.uniform_(weight[2 * hidden :], -candidate_limit, candidate_limit)
            for name in ("bias_ih", "bias_hh"):
                nn.init.zeros_(getattr(self.cells, f"{name}_l{layer}"))
            nn.init.ones_(getattr(self.cells, f"bias_ih_l{layer}")[: 2 * hidden])
