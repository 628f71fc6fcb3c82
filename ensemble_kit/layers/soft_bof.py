"""Soft bag of features: arXiv:1706.06905, equation 7; arXiv:1810.00207, section 2.3."""

from torch import Tensor, nn

from ensemble_kit.layers.normalisation import l2_normalise
from ensemble_kit.layers.soft_assignment import SoftAssignment


class SoftBoF(nn.Module):
    """Describe a set of frames by how much of it falls into each of K clusters.

    ::

        z[k] = sum_t w_t * a_k(x_t),    output = z / |z|

    The code has the L2 norm (17Skye17/2nd-YouTube8M, ``SoftDbofModelLF``); equation 7 has none.

    Args:
        num_features: D, the size of one frame's feature vector.
        num_clusters: K, the number of clusters.
        momentum: The momentum of the batch norm's running statistics.

    Shape:
        - frames: ``(B, T, D)``, floating point.
        - frame_weights: ``(B, R, T)``.
        - output: ``(B, R, K)``, L2 norm 1, or 0 with no frame.
    """

    loops_over_repeats = False

    def __init__(self, *, num_features: int, num_clusters: int, momentum: float) -> None:
        super().__init__()
        self.output_size = num_clusters
        self.projection_fan_in = num_clusters
        self.assignment = SoftAssignment(
            num_features=num_features, num_clusters=num_clusters, momentum=momentum
        )

    def describe(self, frames: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        """Return the soft assignments ``(B, T, K)``."""
        return (self.assignment(frames, row_weights),)

    def aggregate(self, described: tuple[Tensor, ...], frame_weights: Tensor) -> Tensor:
        """Return one normalised histogram for each repeat."""
        (assignment,) = described
        return l2_normalise(frame_weights.to(assignment.dtype) @ assignment)
