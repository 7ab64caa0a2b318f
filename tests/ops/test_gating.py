"""The gate kernel, interpreted, against the formula."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gating import gate_rows, gate_rows_fused
from tests.tiny import quick

ACTIVATIONS = ["silu", "gelu_tanh"]


def operands(rows, width=24, dtype=jnp.float32):
    rng = np.random.default_rng(rows)
    gate_up, grad = (rng.standard_normal((rows, n)) * 2 for n in (2 * width, width))
    routing = rng.standard_normal(rows)
    return jnp.asarray(gate_up, dtype), jnp.asarray(routing, jnp.float32), jnp.asarray(grad, dtype)


@cache
def value_and_gradients(function, *options):
    """(value, gradient of gate_up, gradient of routing) from (gate_up, routing, upstream gradient)."""

    def run(gate_up, routing, grad):
        value, transpose = jax.vjp(lambda gate_up, routing: function(gate_up, routing, *options), gate_up, routing)
        return value, *transpose(grad)

    return quick(run)


# The kernel takes steps of 512 rows: one that is not full, whole ones, and a part-filled last one.
@pytest.mark.parametrize("rows", [128, 640])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernel_equals_the_formula_in_value_and_both_gradients(activation, rows):
    case = operands(rows)
    want = value_and_gradients(gate_rows, activation)(*case)
    got = value_and_gradients(gate_rows_fused, activation, True)(*case)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_in_bfloat16_the_kernel_rounds_once():
    gate_up, routing, grad = operands(256, dtype=jnp.bfloat16)
    want = value_and_gradients(gate_rows, "silu")(*(a.astype(jnp.float32) for a in (gate_up, routing, grad)))
    for got, exact in zip(
        value_and_gradients(gate_rows_fused, "silu", True)(gate_up, routing, grad), want, strict=True
    ):
        np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_nobody_reads_do_not_spread(activation):
    """NaN in the rows past the last expert, which start in the middle of 128."""
    gate_up, routing, grad = operands(640)
    first = 200
    want = value_and_gradients(gate_rows, activation)(gate_up, routing, grad)
    run = value_and_gradients(gate_rows_fused, activation, True)
    got = run(*(a.at[first:].set(jnp.nan) for a in (gate_up, routing, grad)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[:first], b[:first], rtol=1e-5, atol=1e-5)


def test_a_weight_of_zero_gives_an_exact_zero_and_still_a_gradient_of_the_weight():
    gate_up, routing, grad = operands(128)
    value, grad_gate_up, grad_routing = value_and_gradients(gate_rows_fused, "silu", True)(
        gate_up, 0 * routing, grad
    )
    assert (value == 0).all() and (grad_gate_up == 0).all() and (grad_routing != 0).all()
