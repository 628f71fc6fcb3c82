import pytest
import torch
from builders import tiny_frames, tiny_schema

from ensemble_kit.layers.frame_preparation import dequantise
from ensemble_kit.training.mixing import mixed_up, smoothed


def test_smoothed_labels_are_drawn_towards_a_half():
    targets = torch.tensor([[0.0, 1.0, 0.25]])

    assert smoothed(targets, 0.2).tolist() == [pytest.approx([0.1, 0.9, 0.3])]


@pytest.mark.parametrize("value_type", ["uint8", "float32"])
def test_a_video_is_mixed_with_another_frame_by_frame(value_type):
    rng = torch.Generator().manual_seed(0)
    frames, num_frames = tiny_frames(tiny_schema(value_type=value_type), [3, 1, 5, 2], rng)
    targets = torch.eye(4)
    torch.manual_seed(7)

    mixed, mixed_targets = mixed_up(frames, num_frames, targets, 0.5)

    torch.manual_seed(7)  # what it draws: a share for each video, and each video's partner
    shares = torch.distributions.Beta(0.5, 0.5).sample((4,)).tolist()
    partners = torch.randperm(4).tolist()
    for i, (share, j) in enumerate(zip(shares, partners, strict=True)):
        share = max(share, 1 - share)
        expected = share * targets[i] + (1 - share) * targets[j]
        torch.testing.assert_close(mixed_targets[i], expected)
        for name, stored in frames.items():
            values = dequantise(stored) if value_type == "uint8" else stored
            for t in range(5):
                expected = torch.zeros(stored.shape[-1])
                if t < num_frames[i]:  # a shorter partner begins again when it ends
                    other = values[j, t % int(num_frames[j])]
                    expected = share * values[i, t] + (1 - share) * other
                torch.testing.assert_close(mixed[name][i, t], expected)
    assert len(set(partners)) == 4
    assert partners != sorted(partners)
    assert min(shares) < 0.5  # so that the larger share is not the first one by chance
