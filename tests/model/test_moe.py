"""The router's selection."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.model.moe import top_ids
from tests.tiny import quick

EXPERTS = 7


@cache
def both(count):
    return quick(lambda scores: (top_ids(scores, count), jnp.moveaxis(jax.lax.top_k(scores, count)[1], -1, 0)))


# A few values of which some are drawn more than once: ties are the rule.
rows = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 0.5000001, 1.0, 3e38]), min_size=EXPERTS, max_size=EXPERTS)


@given(st.lists(rows, min_size=3, max_size=3), st.sampled_from([1, 2, 4, EXPERTS]))
def test_the_largest_scores_win_and_the_lower_index_among_equals(scores, count):
    got, want = both(count)(jnp.asarray(scores, jnp.float32))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)
