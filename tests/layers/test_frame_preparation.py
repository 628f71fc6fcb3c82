import torch
from reference import dequantise_loops, prepare_loops

from ensemble_kit.layers.frame_preparation import dequantise, mark_frames, prepare_frames


def test_dequantisation_is_the_starter_codes():
    stored = torch.arange(256, dtype=torch.uint8)

    features = dequantise(stored)

    # four times float32's eps: the product, up to 4, is rounded before the offset is added
    torch.testing.assert_close(
        features.tolist(), [dequantise_loops(byte) for byte in range(256)], rtol=0, atol=4 * 2**-23
    )
    assert features[0].item() == -1.9921875
    assert features[255].item() == 2.0078125


def test_the_first_num_frames_are_the_videos_own():
    assert mark_frames(torch.tensor([2, 0, 3]), 3).tolist() == [
        [True, True, False],
        [False, False, False],
        [True, True, True],
    ]


def test_the_joint_frame_is_normalised_as_one_vector(rng):
    rgb = torch.randn(2, 4, 5, generator=rng, dtype=torch.float64)
    audio = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    lengths = [4, 2]

    features, joint, is_frame, _ = prepare_frames(
        {"rgb": rgb, "audio": audio}, torch.tensor(lengths)
    )

    for video, length in enumerate(lengths):
        paper = prepare_loops([rgb[video].tolist(), audio[video].tolist()], length)
        torch.testing.assert_close(joint[video].tolist(), paper)
        assert torch.equal(features[video, :length, :5], rgb[video, :length])
        assert torch.equal(features[video, :length, 5:], audio[video, :length])
        assert not features[video, length:].any()
    assert is_frame.tolist() == [[True] * 4, [True, True, False, False]]


def test_bytes_are_dequantised_before_they_are_padded(rng):
    stored = torch.randint(0, 256, (1, 3, 4), generator=rng, dtype=torch.uint8)

    _, joint, *_ = prepare_frames({"rgb": stored}, torch.tensor([2]))

    features = [[dequantise_loops(byte) for byte in frame] for frame in stored[0].tolist()]
    torch.testing.assert_close(joint[0], torch.tensor(prepare_loops([features], 2)))
    assert joint[0, 2].tolist() == [0.0] * 4


def test_nan_and_infinity_in_padding_are_harmless(rng):
    frames = torch.randn(1, 3, 4, generator=rng)
    spoilt = frames.clone()
    spoilt[0, 1] = torch.nan
    spoilt[0, 2] = torch.inf

    _, clean, *_ = prepare_frames({"rgb": frames}, torch.tensor([1]))
    _, joint, *_ = prepare_frames({"rgb": spoilt}, torch.tensor([1]))

    assert torch.equal(joint, clean)
