from contextlib import suppress

import numpy as np
import pytest
import torch
from builders import tiny_records

from ensemble_kit.errors import PredictionsError
from ensemble_kit.networks.running import measure, seeded


def test_a_seeded_block_draws_the_same_and_the_callers_numbers_go_on_as_if_it_were_not_there():
    torch.manual_seed(7)
    before, after = torch.rand(2), torch.rand(2)
    torch.manual_seed(7)

    assert torch.equal(torch.rand(2), before)
    drawn = []
    for _ in range(2):
        with suppress(KeyError), seeded(3, "cpu"):
            drawn.append(torch.rand(2))
            raise KeyError

    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(2), after)


def test_a_model_that_returns_nan_is_one_error(tmp_path):
    records, _ = tiny_records(tmp_path, num_videos=4)

    def run(batch):
        return np.full((len(batch.ids), records.schema.num_classes), np.nan, np.float32)

    first = next(records.batches(1)).ids[0]
    with pytest.raises(PredictionsError) as caught:
        measure(run, records)

    assert str(caught.value) == (
        f"the model: class 0 of video {first!r} is not a number (NaN).\n"
        "Predict again with a model whose weights and features are finite."
    )
