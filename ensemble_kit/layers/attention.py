"""Attention before, after and inside NetVLAD: S4 (arXiv:1810.00530), sections 3.1 and 3.2."""

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from ensemble_kit.layers.normalisation import BatchNorm, l2_normalise
from ensemble_kit.layers.protocols import PartError, require_divisor
from ensemble_kit.layers.soft_assignment import SoftAssignment

MASKED = -1e9  # finite, so that a row of nothing but padding has no NaN


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention of every row to all rows, in H heads.

    ::

        output = BN([softmax(q_h k_h^T / sqrt(F / H)) v_h for each head h]) Wo + bo

    q, k and v have no bias, and the batch norm is an addition of S4. Otherwise this is the
    attention of Vaswani et al. (2017), as S4's code computes it (pomonam/LearnablePoolingMethods,
    ``TransformerEncoder``). Projections start Glorot uniform.

    Args:
        num_features: F, the size of a row.
        num_heads: H; divides F.
        num_rows: If given, a batch norm over this many key positions takes the place of the
            scaling, as in S4's attention clusters. Each set must then have all its rows or none in
            training, because a key position is normalised over whole sets.
        momentum: The momentum of the batch norms' running statistics.

    Shape:
        - rows: ``(B, N, F)``.
        - is_row: ``(B, N)``, bool; False rows are not attended to.
        - output: ``(B, N, F)``.
    """

    def __init__(
        self, *, num_features: int, num_heads: int, momentum: float, num_rows: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Linear(num_features, num_features, bias=False)
        self.keys = nn.Linear(num_features, num_features, bias=False)
        self.values = nn.Linear(num_features, num_features, bias=False)
        self.output = nn.Linear(num_features, num_features)
        for layer in (self.queries, self.keys, self.values, self.output):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.output.bias)
        self.logit_norm = (
            BatchNorm(num_features=num_rows, momentum=momentum) if num_rows is not None else None
        )
        self.head_norm = BatchNorm(num_features=num_features, momentum=momentum)

    def forward(self, rows: Tensor, is_row: Tensor) -> Tensor:
        """Return, for each row, the values of all rows weighted by its attention to them."""
        queries, keys, values = (
            self._heads(layer(rows)) for layer in (self.queries, self.keys, self.values)
        )
        logits = queries @ keys.mT  # (B, H, N, N)
        if self.logit_norm is None:
            logits = logits / sqrt(queries.shape[-1])
        else:
            rows_of_heads = is_row.unsqueeze(1).expand(-1, self.num_heads, -1)
            logits = self.logit_norm(logits, rows_of_heads)
        logits = torch.where(is_row[:, None, None], logits, MASKED)
        attended = (logits.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
        weights = is_row.to(rows.dtype)
        output: Tensor = self.output(self.head_norm(attended, weights))
        return output

    def _heads(self, rows: Tensor) -> Tensor:
        batch, count, features = rows.shape
        heads = rows.reshape(batch, count, self.num_heads, features // self.num_heads)
        return heads.transpose(1, 2)


class Encoder(nn.Module):
    """One encoder of a transformer, with no positions: ``R^{N x F} -> R^{N x F}``.

    ::

        y = LN(x + attention(x)),    output = LN(y + relu(y W1 + b1) W2 + b2)

    The batch norm inside the attention block is in the paper. Its code has a third layer norm and a
    second residual connection around the feed-forward part instead, with as many parameters.

    Args:
        num_features: F.
        num_heads: H.
        momentum: The momentum of the batch norm's running statistics.

    Shape:
        - rows: ``(B, N, F)``; ``is_row``: ``(B, N)``, bool.
        - output: ``(B, N, F)``.
    """

    def __init__(self, *, num_features: int, num_heads: int, momentum: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            num_features=num_features, num_heads=num_heads, momentum=momentum
        )
        self.attention_norm = nn.LayerNorm(num_features)
        self.widen = nn.Linear(num_features, 4 * num_features)
        self.narrow = nn.Linear(4 * num_features, num_features)
        self.norm = nn.LayerNorm(num_features)
        for layer in (self.widen, self.narrow):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor, is_row: Tensor) -> Tensor:
        """Return the encoded rows."""
        attended: Tensor = self.attention_norm(rows + self.attention(rows, is_row))
        encoded: Tensor = self.norm(attended + self.narrow(self.widen(attended).relu()))
        return encoded


class ClusterEncoder(nn.Module):
    """The encoder that computes similarities: ``R^{N x F} -> R^{N x K}`` (S4, 3.2, encoder 2*).

    ::

        y = LN(x + attention(x)),    a = BN(relu(BN(relu(y W1 + b1)) W2 + b2))

    There is no softmax, and similarities may be negative. As in the code (``NetVladAttenCluster``)
    a batch norm over key positions takes the place of the scaling of the attention's logits. The
    layer therefore works on N frames only, and in training each video has all of them or none. The
    code's dropout with rate 0.9 looks like a mistake and is left out.

    Args:
        num_features: F.
        num_clusters: K.
        num_heads: H.
        num_frames: N, the number of frames that are sampled.
        momentum: The momentum of the batch norms' running statistics.

    Shape:
        - rows: ``(B, N, F)``; ``is_row``: ``(B, N)``, bool.
        - output: ``(B, N, K)``.
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_clusters: int,
        num_heads: int,
        num_frames: int,
        momentum: float,
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            num_features=num_features, num_heads=num_heads, momentum=momentum, num_rows=num_frames
        )
        self.attention_norm = nn.LayerNorm(num_features)
        self.widen = nn.Linear(num_features, 4 * num_features)
        self.wide_norm = BatchNorm(num_features=4 * num_features, momentum=momentum)
        self.narrow = nn.Linear(4 * num_features, num_clusters)
        self.norm = BatchNorm(num_features=num_clusters, momentum=momentum)
        for layer in (self.widen, self.narrow):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor, is_row: Tensor) -> Tensor:
        """Return every row's similarity to every cluster."""
        weights = is_row.to(rows.dtype)
        attended = self.attention_norm(rows + self.attention(rows, is_row))
        wide = self.wide_norm(self.widen(attended).relu(), weights)
        similarities: Tensor = self.norm(self.narrow(wide).relu(), weights)
        return similarities


class AttentionNetVLAD(nn.Module):
    """NetVLAD with encoders around it or in place of its assignment (S4, 3.1 and 3.2).

    ::

        x = encoder(frames) if encode_frames
        a = softmax(BN(x W)),  or  ClusterEncoder(x) with similarity "attention"
        V[k] = l2(sum_t a_k(x_t) (x_t - c_k))
        V = encoder(V) over clusters if encode_clusters;   output = l2(V)

    With attention a frame's contribution depends on all sampled frames, so this pooling runs on the
    sampled frames themselves, once for each repeat, and not on frame weights.

    Args:
        num_features: F, the size of one frame's feature vector.
        num_clusters: K.
        num_heads: H of every encoder; divides F.
        encode_frames: Whether an encoder over frames comes before the assignment.
        encode_clusters: Whether an encoder over clusters comes after the aggregation.
        similarity: ``softmax`` or ``attention``.
        num_frames: N, the number of frames that are sampled, or None for all frames of a video,
            which ``similarity`` ``attention`` does not allow.
        momentum: The momentum of the batch norms' running statistics.

    Shape:
        - frames: ``(B, N, F)``, floating point.
        - num_frames: ``(B,)``, integers in [0, N]; rows from there on change nothing.
        - output: ``(B, K * F)``, cluster-major, L2 norm 1, or 0 with no frame.

    Raises:
        PartError: ``num_heads`` does not divide F, or ``similarity`` is ``attention`` and
            ``num_frames`` is None.
    """

    not_products = frozenset({"centres"})

    def __init__(
        self,
        *,
        num_features: int,
        num_clusters: int,
        num_heads: int,
        encode_frames: bool,
        encode_clusters: bool,
        similarity: Literal["softmax", "attention"],
        num_frames: int | None,
        momentum: float,
    ) -> None:
        super().__init__()
        require_divisor("num_heads", num_heads, num_features)
        self.output_size = num_clusters * num_features
        self.projection_fan_in = num_clusters

        def encoder() -> Encoder:
            return Encoder(num_features=num_features, num_heads=num_heads, momentum=momentum)

        self.frame_encoder = encoder() if encode_frames else None
        self.assignment: nn.Module
        if similarity == "softmax":
            self.assignment = SoftAssignment(
                num_features=num_features, num_clusters=num_clusters, momentum=momentum
            )
        elif num_frames is None:
            raise PartError(
                "similarity",
                "attention over frames needs a fixed number of them, and all are read",
                advice="'softmax', or sample a fixed number of frames (sampling.num_frames)",
            )
        else:
            self.assignment = ClusterEncoder(
                num_features=num_features,
                num_clusters=num_clusters,
                num_heads=num_heads,
                num_frames=num_frames,
                momentum=momentum,
            )
        self.centres = nn.Parameter(torch.randn(num_clusters, num_features) / sqrt(num_features))
        self.cluster_encoder = encoder() if encode_clusters else None

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """Return one descriptor for each set of frames."""
        positions = torch.arange(frames.shape[1], device=frames.device)
        is_frame = positions < num_frames.unsqueeze(1)
        weights = is_frame.to(frames.dtype)
        if self.frame_encoder is not None:
            frames = self.frame_encoder(frames, is_frame)
        if isinstance(self.assignment, SoftAssignment):
            similarities = self.assignment(frames, weights)
        else:
            similarities = self.assignment(frames, is_frame)
        similarities = similarities * weights.unsqueeze(-1)
        mass = similarities.sum(dim=1).unsqueeze(-1)  # (B, K, 1)
        clusters = l2_normalise(similarities.mT @ frames - mass * self.centres)
        if self.cluster_encoder is not None:
            is_cluster = (num_frames > 0).unsqueeze(1).expand(-1, clusters.shape[1])
            encoded = self.cluster_encoder(clusters, is_cluster)
            clusters = encoded * is_cluster.unsqueeze(-1).to(frames.dtype)
        return l2_normalise(clusters.flatten(1))
