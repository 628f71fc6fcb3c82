"""Features as bytes, and back."""

import numpy as np

from ensemble_kit.data.encode import dequantise


def test_bytes_are_read_back_as_the_sub_models_read_them():
    import torch

    from ensemble_kit.layers.frame_preparation import dequantise as in_the_graph

    every = np.arange(256, dtype=np.uint8)

    expected = in_the_graph(torch.from_numpy(every)).numpy()
    np.testing.assert_allclose(dequantise(every), expected, rtol=0, atol=2**-22)
