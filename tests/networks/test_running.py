from contextlib import suppress

import torch

from ensemble_kit.networks.running import seeded


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
