"""Dispatch and combine: a permutation with nothing lost, and its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.parallel.dispatch import plan_rows, run_local

EXPERTS = 5


def _scaled(rows_RD, sizes_E, factor_E):
    """An "expert" that multiplies by its own factor, and NaN in rows that belong to nobody."""
    expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(rows_RD.shape[0]), side="right")
    factor = jnp.append(factor_E, jnp.nan)[expert_R]
    return rows_RD * factor[:, None]


@partial(jax.jit, static_argnums=4)
def _run(x_TD, ids_TK, mix_TK, factor_E, capacity):
    def total(x_TD):
        y_TD, kept = run_local(_scaled, (factor_E,), x_TD, ids_TK, mix_TK, EXPERTS, capacity)
        return y_TD.sum(), (y_TD, kept)

    grad, (y_TD, kept) = jax.grad(total, has_aux=True)(x_TD)
    return y_TD, kept, grad


@given(st.lists(st.integers(0, EXPERTS), min_size=12, max_size=12), st.sampled_from([None, 1, 2, 12]))
@settings(max_examples=60)
def test_every_kept_pair_reaches_its_expert_and_comes_back(ids, capacity):
    ids_TK = jnp.asarray(ids, jnp.int32).reshape(6, 2)
    x_TD = jnp.arange(6 * 3, dtype=jnp.float32).reshape(6, 3) + 1
    mix_TK = jnp.linspace(0.5, 1.5, 12).reshape(6, 2)
    factor_E = jnp.asarray([2.0, 3.0, 5.0, 7.0, 11.0])

    y_TD, kept, grad = _run(x_TD, ids_TK, mix_TK, factor_E, capacity)
    seen = np.zeros(EXPERTS + 1, int)
    want, dx = np.zeros((6, 3)), np.zeros((6, 3))
    count = 0
    for t in range(6):
        for k in range(2):
            e = int(ids_TK[t, k])
            if e < EXPERTS and (capacity is None or seen[e] < capacity):
                want[t] += float(mix_TK[t, k]) * float(factor_E[e]) * np.asarray(x_TD[t])
                dx[t] += float(mix_TK[t, k]) * float(factor_E[e])
                count += 1
            seen[e] += 1
    np.testing.assert_allclose(y_TD, want, rtol=1e-5)
    assert int(kept) == count
    np.testing.assert_allclose(grad, dx, rtol=1e-5)


def test_rows_of_one_expert_keep_the_order_of_their_tokens():
    ids_TK = jnp.asarray([[1, 0], [0, 1], [1, 4]], jnp.int32)
    pair_R, sizes_E, _ = plan_rows(ids_TK, EXPERTS, None)
    assert pair_R.tolist() == [1, 2, 0, 3, 4, 5]
    assert sizes_E.tolist() == [2, 3, 0, 0, 1]
