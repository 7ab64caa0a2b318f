"""Head norm and rotation: the kernel, interpreted, against plain JAX, and both against the description."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RopeConfig
from moe_jax.model.rope import halves_first, rotation
from moe_jax.ops.rotary import prepare_heads, prepare_heads_fused
from tests.tiny import quick

BATCH, HEADS, WIDTH, SCALE = 2, 3, 16, 0.25
ROPE = RopeConfig(theta=100.0, original_max_position_embeddings=64)


def operands(length, dtype=jnp.float32):
    """Heads, an upstream gradient, and the angles of positions that restart in the middle of each row."""
    rng = np.random.default_rng(length)
    shape = (BATCH, HEADS, WIDTH, length)
    heads, grad = (jnp.asarray(rng.standard_normal(shape) * 2, dtype) for _ in range(2))
    starts = jnp.asarray([[length // 3], [length // 2]])
    place = jnp.arange(length)[None]
    positions = jnp.where(place < starts, place, place - starts)
    return heads, grad, *rotation(positions, ROPE, WIDTH)


@cache
def value_and_gradient(function, *options):
    def run(heads, grad, cos, sin):
        value, transpose = jax.vjp(lambda heads: function(heads, cos, sin, *options), heads)
        return value, *transpose(grad)

    return quick(run)


# The kernel takes steps of 512 tokens: one that is not full, and a part-filled last one.
@pytest.mark.parametrize("length", [128, 640])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_the_kernel_equals_plain_jax_in_value_and_gradient(eps, length):
    case = operands(length)
    want = value_and_gradient(prepare_heads, eps, SCALE)(*case)
    got = value_and_gradient(prepare_heads_fused, eps, SCALE, True)(*case)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_kernel_rounds_once():
    heads, grad, cos, sin = operands(128, jnp.bfloat16)
    exact = (heads.astype(jnp.float32), grad.astype(jnp.float32), cos, sin)
    want = value_and_gradient(prepare_heads, 1e-5, SCALE)(*exact)
    got = value_and_gradient(prepare_heads_fused, 1e-5, SCALE, True)(heads, grad, cos, sin)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-5)


def test_the_kernel_gives_no_gradient_by_the_angles():
    heads, _, cos, sin = operands(128)
    run = quick(jax.grad(lambda *a: prepare_heads_fused(*a, 1e-5, SCALE, True).sum(), (1, 2)))
    grads = run(heads, cos, sin)
    assert all((g == 0).all() for g in grads)


def interleaved(head, position):
    """Normalise one head and rotate its adjacent pairs, number by number, float64."""
    head = head / np.sqrt((head**2).mean() + 1e-5)
    out = np.empty_like(head)
    for pair in range(WIDTH // 2):
        frequency = ROPE.theta ** (-2 * pair / WIDTH)
        if 2 * np.pi / frequency > ROPE.original_max_position_embeddings:
            frequency /= ROPE.factor
        c, s = np.cos(position * frequency), np.sin(position * frequency)
        a, b = head[2 * pair : 2 * pair + 2]
        out[2 * pair : 2 * pair + 2] = a * c - b * s, a * s + b * c
    return out


@pytest.mark.parametrize(
    "prepare", [prepare_heads, lambda *a: prepare_heads_fused(*a, True)], ids=["plain", "kernel"]
)
def test_scores_of_permuted_columns_equal_those_of_interleaved_pairs(prepare):
    """The model's weights are for adjacent pairs; it permutes their columns so that halves rotate instead."""
    length, model = 128, 8
    rng = np.random.default_rng(0)
    x = rng.standard_normal((length, model))
    weights = rng.standard_normal((2, model, WIDTH))
    positions = rng.permutation(length)
    angles = rotation(jnp.asarray(positions)[None], ROPE, WIDTH)
    q, k = (
        quick(lambda heads, cos, sin, scale=scale: prepare(heads, cos, sin, 1e-5, scale))(
            jnp.einsum("sd,dh->hs", x, halves_first(jnp.asarray(w)))[None, None], *angles
        )
        for w, scale in zip(weights, (SCALE, 1.0), strict=True)
    )
    got = jnp.einsum("hs,hc->sc", q[0, 0], k[0, 0])
    expected_q, expected_k = (
        np.stack([interleaved(head, position) for head, position in zip(x @ w, positions, strict=True)])
        for w in weights
    )
    np.testing.assert_allclose(got, SCALE * expected_q @ expected_k.T, rtol=1e-4, atol=1e-4)
