"""Chunked cross entropy against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.cross_entropy import cross_entropy_sum, cross_entropy_sum_reference


def _case(length=13):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, length, 16), np.float32))
    head = jnp.asarray(rng.standard_normal((50, 16), np.float32))
    targets = jnp.asarray(rng.integers(0, 50, (3, length)), jnp.int32)
    weight = jnp.asarray(rng.integers(0, 2, (3, length)), jnp.float32)
    return hidden, head, targets, weight


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_value_and_gradients_equal_the_definition(chunk):
    hidden, head, targets, weight = _case()
    got = jax.value_and_grad(lambda h, w: 3 * cross_entropy_sum(h, w, targets, weight, chunk), (0, 1))
    want = jax.value_and_grad(lambda h, w: 3 * cross_entropy_sum_reference(h, w, targets, weight), (0, 1))
    for a, b in zip(jax.tree.leaves(got(hidden, head)), jax.tree.leaves(want(hidden, head)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_masked_tokens_give_no_loss_and_no_gradient():
    hidden, head, targets, _ = _case()
    weight = jnp.zeros((3, 13)).at[0, 5].set(1.0)
    grad = jax.grad(cross_entropy_sum)(hidden, head, targets, weight, 4)
    assert (grad[0, 5] != 0).any()
    assert (grad.at[0, 5].set(0) == 0).all()


def test_all_logits_never_exist_at_once():
    """No array of the compiled program is as large as tokens x vocabulary."""
    batch, length, width, vocab, chunk = 2, 512, 8, 1024, 32
    shapes = [(batch, length, width), (vocab, width), (batch, length), (batch, length)]
    types = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    abstract = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
    run = jax.jit(jax.grad(lambda *a: cross_entropy_sum(*a, chunk), (0, 1)))
    stats = run.lower(*abstract).compile().memory_analysis()
    assert stats is not None and stats.temp_size_in_bytes < batch * length * vocab * 4 / 4
