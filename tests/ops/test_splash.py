"""The Splash kernels, interpreted, against plain attention under the causal mask."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig
from moe_jax.ops import splash as module
from moe_jax.ops.attention import attention, causal_mask
from moe_jax.ops.splash import splash_attention
from tests.tiny import mesh_of, quick

BATCH, HEADS, GROUPS, WIDTH, LENGTH = 2, 4, 2, 32, 512


def operands():
    """q, k, v, an upstream gradient, and segments: documents that end inside blocks, and padding in one row."""
    rng = np.random.default_rng(0)
    q, k, v, grad = (
        jnp.asarray(rng.standard_normal((BATCH, heads, *shape)), jnp.float32)
        for heads, shape in [
            (HEADS, (WIDTH, LENGTH)), (GROUPS, (WIDTH, LENGTH)), (GROUPS, (WIDTH, LENGTH)), (HEADS, (LENGTH, WIDTH))
        ]
    )  # fmt: skip
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[0, 90:], segments[0, 300:], segments[0, 470:] = 2, 3, 0
    segments[1, 257:] = 2
    return q / WIDTH**0.5, k, v, jnp.asarray(segments), grad * (segments > 0)[:, None, :, None]


def plain(q, k, v, segments):
    place = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    return attention(q, k, v, causal_mask(place, place, segments, segments))


@cache
def expected():
    return value_and_gradients(plain, *operands())


def value_and_gradients(function, q, k, v, segments, grad):
    def run(q, k, v, segments, grad):
        value, transpose = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
        return value, *transpose(grad)

    return quick(run)(q, k, v, segments, grad)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"context": 2}, {"tensor": 2}, {"data": 2, "context": 2, "tensor": 2}],
    ids=["one", "context", "tensor", "all"],
)
def test_value_and_gradients_equal_plain_attention(sizes, monkeypatch):
    """On whole rows, with queries cut over the sequence, with heads cut, and all of it."""
    monkeypatch.setattr(module, "BLOCK", 128)
    mesh = mesh_of(MeshConfig(**{"fsdp": 1} | sizes))
    where = NamedSharding(mesh, PartitionSpec())
    case = jax.device_put(operands(), where)

    def run(q, k, v, segments):
        return splash_attention(q, k, v, segments, mesh, interpret=True)

    real = (case[3] > 0)[:, None, :, None]
    got, *grads = value_and_gradients(run, *case)
    want, *want_grads = expected()
    np.testing.assert_allclose(jnp.where(real, got, 0), jnp.where(real, want, 0), rtol=1e-5, atol=2e-5)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
