"""The Splash kernels, interpreted, against plain attention under the causal mask."""

import importlib.util
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from launch.fit_compile import devices_of
from launch.slices import parse_slice
from moe_jax.chips import LANES
from moe_jax.config import MeshConfig
from moe_jax.ops.attention import attention, causal_mask
from moe_jax.parallel import splash as module
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.splash import splash_attention
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


@given(st.integers(1, 64))
def test_blocks_divide_every_sequence_of_whole_registers(registers):
    length = LANES * registers
    block = module._block(length)
    assert length % block == 0 and block % LANES == 0 and LANES <= block <= module.BLOCK
    assert block == module.BLOCK or length % module.BLOCK


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_sequence_of_odd_registers_compiles_for_tpu():
    mesh = make_mesh(MeshConfig(fsdp=-1), devices_of(parse_slice("v5e-4"), 1))
    shapes = [(4, HEADS, WIDTH, 640), (4, GROUPS, WIDTH, 640), (4, GROUPS, WIDTH, 640)]
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in shapes)
    segments = jax.ShapeDtypeStruct((4, 640), jnp.int32, sharding=where)

    def total(q, k, v, segments):
        return splash_attention(q, k, v, segments, mesh).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v, segments).compile().as_text()
    assert text and "splash_mha_dkv" in text


@pytest.mark.parametrize(
    ("sizes", "largest"),
    [
        ({}, 128),
        ({"context": 2}, 128),
        ({"context": 2}, module.BLOCK),
        ({"tensor": 2}, 128),
        ({"data": 2, "context": 2, "tensor": 2}, 128),
    ],
    ids=["one", "context", "blocks of queries smaller than of keys", "tensor", "all"],
)
def test_value_and_gradients_equal_plain_attention(sizes, largest, monkeypatch):
    """On whole rows, with queries cut over the sequence, with heads cut, and all of it."""
    monkeypatch.setattr(module, "BLOCK", largest)
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
