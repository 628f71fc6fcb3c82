"""Scores as integers that sort alike."""

import numpy as np
from candidate_builders import MISSING
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.metrics import pooled_average_precision
from ensemble_kit.selection.ranking import ABSENT, key_flags, pooled_gap, to_keys


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_pool_of_keys_has_the_gap_of_its_scores(data):
    shape = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    count = shape[0] * shape[1]
    score = st.sampled_from([MISSING, 0.0, 1e-30, 0.5, 0.5 + 2**-50, 1.0]) | st.floats(0, 1)
    drawn = data.draw(st.lists(score, min_size=count, max_size=count))
    scores = -np.sort(-np.array(drawn).reshape(shape), axis=1)  # best first
    hits = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    hits = hits.reshape(shape) & (scores > MISSING)
    flags = key_flags(hits)
    flags[scores == MISSING] = ABSENT

    keys = to_keys(np.maximum(scores, 0), flags)[:, ::-1]

    is_ranked = scores > MISSING
    expected = pooled_average_precision(scores[is_ranked], hits[is_ranked], 7)
    assert pooled_gap(np.ascontiguousarray(keys), 7) == expected
