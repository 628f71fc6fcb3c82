"""Classifier heads: from features to the probability of every class.

Under autocast the products are computed in bfloat16 and everything after them in float32, because
near 1 a bfloat16 number has only two decimal digits.
"""

from torch import Tensor, nn

from ensemble_kit.layers.precision import at_least_float32


class Logistic(nn.Module):
    """One logistic regression for each class: ``p = sigmoid(x W + b)``.

    W starts Glorot uniform and b at 0, as in TF-slim's fully connected layer.

    Args:
        num_features: D, the size of the features.
        num_classes: C.

    Shape:
        - features: ``(..., D)``, floating point.
        - output: probabilities, ``(..., C)``.
    """

    def __init__(self, *, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(num_features, num_classes)
        nn.init.xavier_uniform_(self.classes.weight)
        nn.init.zeros_(self.classes.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the probability of every class."""
        return at_least_float32(self.classes(features)).sigmoid()

    def regularised(self) -> list[Tensor]:
        """Return the kernels that the L2 penalty applies to."""
        return [self.classes.weight]


class MixtureOfExperts(nn.Module):
    """M logistic experts for each class, mixed by a softmax gate that also has a dummy entry.

    ::

        p_c = sum_{m < M} softmax_m(x Wg_c) * sigmoid(x We_cm + be_cm)

    The softmax runs over M + 1 entries. The last one, the dummy, belongs to no expert, so the gate
    can turn all experts down. The gates have no bias. The code is google/youtube-8m, ``MoeModel``;
    equations 6 to 8 of the MFB paper (S1) are the same without the dummy. Kernels start Glorot
    uniform.

    Args:
        num_features: D, the size of the features.
        num_classes: C.
        num_experts: M, the experts of one class.
        gate_rank: The inner size of low-rank gates, ``x Wr Wg``; None for gates of full rank.

    Shape:
        - features: ``(..., D)``, floating point.
        - output: probabilities, ``(..., C)``, in [0, 1).
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_classes: int,
        num_experts: int,
        gate_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_classes = num_classes
        self.reduction: nn.Linear | None = None
        if gate_rank is not None:
            self.reduction = nn.Linear(num_features, gate_rank, bias=False)
            nn.init.xavier_uniform_(self.reduction.weight)
        gate_features = gate_rank or num_features
        self.gates = nn.Linear(gate_features, num_classes * (num_experts + 1), bias=False)
        self.experts = nn.Linear(num_features, num_classes * num_experts)
        nn.init.xavier_uniform_(self.gates.weight)
        nn.init.xavier_uniform_(self.experts.weight)
        nn.init.zeros_(self.experts.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the probability of every class."""
        reduced = features if self.reduction is None else self.reduction(features)
        gates = self.gates(reduced).unflatten(-1, (self.num_classes, self.num_experts + 1))
        experts = self.experts(features).unflatten(-1, (self.num_classes, self.num_experts))
        shares = at_least_float32(gates).softmax(dim=-1)[..., :-1]
        mixture: Tensor = shares * at_least_float32(experts).sigmoid()
        return mixture.sum(dim=-1)

    def regularised(self) -> list[Tensor]:
        """Return the kernels that the L2 penalty applies to."""
        kernels = [self.gates.weight, self.experts.weight]
        return kernels if self.reduction is None else [self.reduction.weight, *kernels]
