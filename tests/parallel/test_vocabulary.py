"""Both ends of the model on a mesh: the table's rows, the loss over it, and the table's gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.ops.cross_entropy import cross_entropy_reference
from moe_jax.parallel.rules import sharding
from moe_jax.parallel.vocabulary import look_up, next_token_loss
from tests.tiny import mesh_of, quick

BATCH, LENGTH, WIDTH, VOCAB = 8, 8, 16, 24
MESHES = {
    "one": MeshConfig(fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(fsdp=1, tensor=8),
    "mixed": MeshConfig(fsdp=2, context=2, tensor=2),
    "slices": MeshConfig(slices=2, fsdp=1, expert=2, tensor=2),
}


@cache
def operands():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    hidden, grad = rng.standard_normal((2, BATCH, LENGTH, WIDTH)).astype(np.float32)
    ids = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    weight = jnp.asarray(rng.integers(0, 2, (BATCH, LENGTH)), jnp.float32)
    return table, hidden, grad, ids, weight


def on_mesh(name):
    """(mesh, table where it lives)."""
    mesh = mesh_of(MESHES[name])
    return mesh, jax.device_put(operands()[0], sharding(mesh, ("vocab", "embed")))


@pytest.mark.parametrize("name", MESHES)
def test_looking_up_equals_indexing_in_value_and_gradient(name):
    table, _, grad, ids, _ = operands()
    mesh, placed = on_mesh(name)

    @quick
    def run(table, grad):
        value, transpose = jax.vjp(lambda table: look_up(table, ids, mesh), table)
        return value, *transpose(grad)

    value, grad_table = run(placed, grad)
    assert (np.asarray(value) == table[ids]).all()
    want = np.zeros_like(table)
    np.add.at(want, np.asarray(ids), grad)
    np.testing.assert_allclose(grad_table, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_the_loss_equals_its_definition_in_value_and_gradients(name):
    table, hidden, _, ids, weight = operands()
    mesh, placed = on_mesh(name)

    def definition(hidden, table):
        flat = hidden.reshape(-1, WIDTH), table, ids.reshape(-1), weight.reshape(-1)
        return 3 * cross_entropy_reference(*flat)

    def loss(hidden, table):
        return 3 * next_token_loss(hidden, table, ids, weight, mesh, chunk=4)

    want, want_grads = jax.value_and_grad(definition, (0, 1))(hidden, table)
    np.testing.assert_allclose(quick(loss)(hidden, placed), want, rtol=1e-5)  # as an evaluation takes it
    got, grads = quick(jax.value_and_grad(loss, (0, 1)))(hidden, placed)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_frequent_token_keeps_growing_in_bfloat16():
    """A sum of ones in bfloat16 stops at 256."""
    mesh = mesh_of(MESHES["one"])
    ids = jnp.full((8, 512), 3, jnp.int32)
    table = jnp.zeros((VOCAB, 2), jnp.bfloat16)
    grad = quick(jax.grad(lambda table: look_up(table, ids, mesh).astype(jnp.float32).sum()))(table)
    assert (grad[3] == 4096).all() and (grad.at[3].set(0) == 0).all()


def test_gradients_in_bfloat16_are_scaled_in_float32_and_rounded_once():
    """As in a mean over tokens, whose count bfloat16 cannot hold."""
    table, hidden, _, ids, weight = operands()
    mesh = mesh_of(MESHES["one"])

    def gradients(scale):
        def loss(hidden, table):
            return scale * next_token_loss(hidden, table, ids, weight, mesh, chunk=8)

        return quick(jax.grad(loss, (0, 1)))(hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16))

    for whole, third in zip(gradients(1.0), gradients(1 / 3), strict=True):
        assert (third == (whole.astype(jnp.float32) * (1 / 3)).astype(jnp.bfloat16)).all()
