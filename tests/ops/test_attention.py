"""Attention a block of queries at a time, against all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import attention as module
from moe_jax.ops.attention import attention, blocked_attention, causal_mask
from tests.tiny import quick

BATCH, GROUPS, WIDTH = 2, 2, 8


def operands(heads, length, dtype=jnp.float32):
    """q, k, v, an upstream gradient, and rows of documents that end inside blocks, with padding in one."""
    rng = np.random.default_rng(length)
    shapes = [(heads, WIDTH, length), (GROUPS, WIDTH, length), (GROUPS, WIDTH, length), (heads, length, WIDTH)]
    q, k, v, grad = (jnp.asarray(rng.standard_normal((BATCH, *shape)), dtype) for shape in shapes)
    segments = np.ones((BATCH, length), np.int32)
    cut, end = length // 3, length - 2
    segments[0, cut:], segments[0, end:] = 2, 0
    place = np.broadcast_to(np.arange(length), (BATCH, length))
    first = np.array([[np.argmax(row == s) for s in row] for row in segments])
    return q, k, v, (place - first).astype(np.int32), segments, grad * (segments > 0)[:, None, :, None]


def plain(q, k, v, positions, segments):
    return attention(q, k, v, causal_mask(positions, positions, segments, segments))


def value_and_gradients(function, q, k, v, positions, segments, grad):
    value, transpose = jax.vjp(lambda q, k, v: function(q, k, v, positions, segments), q, k, v)
    return value * (segments > 0)[:, None, :, None], *transpose(grad)


# Blocks of 8: a part-filled one alone, whole ones, a part-filled last one; each key head with 1 and 3 queries.
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("length", [6, 16, 29])
def test_blocks_equal_the_whole_in_value_and_gradients(length, heads, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    case = operands(heads, length)
    want = quick(value_and_gradients, static_argnums=0)(plain, *case)
    got = quick(lambda *a: value_and_gradients(blocked_attention, *a))(*case)  # a fresh trace, for BLOCK
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_blocks_are_as_near_to_float32_as_the_whole():
    case = operands(2, 16, jnp.bfloat16)
    exact = quick(value_and_gradients, static_argnums=0)(plain, *(jnp.asarray(a, jnp.float32) for a in case))
    got = quick(value_and_gradients, static_argnums=0)(blocked_attention, *case)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


def test_in_bfloat16_what_all_values_share_cancels_in_the_gradients_of_queries_and_keys():
    """Half of each value is 1 everywhere, so a large gradient of it reaches all weights of a query alike."""
    q, k, v, positions, segments, grad = operands(2, 16, jnp.bfloat16)
    shared = WIDTH // 2
    case = (q, k, v.at[:, :, :shared].set(1), positions, segments, grad.at[..., :shared].multiply(64))
    exact = quick(value_and_gradients, static_argnums=0)(plain, *(jnp.asarray(a, jnp.float32) for a in case))
    got = quick(value_and_gradients, static_argnums=0)(blocked_attention, *case)
    for a, b in zip(got, exact, strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.02 * jnp.linalg.norm(b)


def test_a_document_sees_neither_the_one_before_nor_what_comes_later():
    q, k, v, positions, segments, _ = operands(2, 16)
    before = blocked_attention(q, k, v, positions, segments)
    for place, others in ((4, slice(5, None)), (9, slice(0, 9))):  # document 2 of row 0 starts at place 5
        changed = blocked_attention(q, k.at[..., place].add(1), v.at[..., place].add(1), positions, segments)
        np.testing.assert_array_equal(before[0, :, others], changed[0, :, others])
        assert (before[0, :, place] != changed[0, :, place]).any()
