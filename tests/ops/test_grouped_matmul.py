"""Three implementations of the grouped product, one meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from moe_jax.ops.grouped_matmul import grouped_matmul, implementation_for, tile_sizes

# Shapes are few because each is compiled; group sizes are drawn freely, empty groups included.
SHAPES = [(96, 40, 24, 5), (200, 130, 72, 3), (64, 32, 136, 7)]


def _operands(shape, seed=0):
    rows, inner, columns, groups = shape
    rng = np.random.default_rng(seed)
    lhs = rng.standard_normal((rows, inner), np.float32)
    rhs = rng.standard_normal((groups, inner, columns), np.float32)
    return jnp.asarray(lhs), jnp.asarray(rhs)


def _value_and_gradients(implementation, **kwargs):
    @jax.jit
    def run(lhs, rhs, sizes, weights):
        def loss(lhs, rhs):
            out = grouped_matmul(lhs, rhs, sizes, implementation=implementation, **kwargs)
            return (out * weights).sum(), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(lhs, rhs)
        return out, *grads

    return run


REFERENCE, TILES = _value_and_gradients("dense"), _value_and_gradients("tiles")
MEGABLOX = _value_and_gradients("megablox", interpret=True)


def _assert_agree(run, shape, sizes):
    lhs, rhs = _operands(shape)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((shape[0], shape[2]), np.float32))
    sizes = jnp.asarray(sizes, jnp.int32)
    for got, want in zip(run(lhs, rhs, sizes, weights), REFERENCE(lhs, rhs, sizes, weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-4)


@st.composite
def shapes_and_sizes(draw, shapes):
    shape = draw(st.sampled_from(shapes))
    rows, groups = shape[0], shape[3]
    total = draw(st.integers(0, rows))
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=groups - 1, max_size=groups - 1)))
    return shape, np.diff([0, *cuts, total])


@given(shapes_and_sizes(SHAPES))
@settings(max_examples=40)
def test_the_tile_loop_equals_the_reference_in_value_and_gradient(case):
    _assert_agree(TILES, *case)


@pytest.mark.parametrize("sizes", [[0, 0, 96, 0, 0], [20, 0, 31, 5, 0], [0, 0, 0, 0, 0], [16, 16, 16, 16, 32]])
def test_megablox_equals_the_reference_in_value_and_gradient(sizes):
    _assert_agree(MEGABLOX, SHAPES[0], sizes)


@pytest.mark.parametrize("sizes", [[100, 0, 60], [0, 1, 0]])
def test_megablox_is_right_where_k_and_n_are_no_multiple_of_the_tile(sizes):
    _assert_agree(MEGABLOX, SHAPES[1], sizes)


def test_uninitialised_rows_never_reach_the_result():
    """The kernel runs in memory filled with NaN, as a TPU may hand it out."""
    lhs, rhs = _operands(SHAPES[0])
    lhs = lhs.at[50:].set(jnp.nan)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        run = _value_and_gradients("megablox")
        out, grad_lhs, grad_rhs = run(lhs, rhs, jnp.asarray([20, 0, 25, 5, 0], jnp.int32), jnp.ones((96, 24)))
    assert (out[50:] == 0).all() and (grad_lhs[50:] == 0).all()
    assert np.isfinite(np.asarray(out)).all() and np.isfinite(np.asarray(grad_rhs)).all()


def test_an_empty_group_gets_a_zero_gradient():
    lhs, rhs = _operands(SHAPES[0])
    for run in (TILES, MEGABLOX):
        grad = run(lhs, rhs, jnp.asarray([50, 0, 46, 0, 0], jnp.int32), jnp.ones((96, 24)))[2]
        assert (grad[1] == 0).all() and (grad[0] != 0).any()


def test_the_platform_of_the_mesh_chooses_the_implementation():
    assert implementation_for("tpu") == "megablox"
    assert implementation_for("cpu") == "tiles"


def test_an_unknown_implementation_is_refused():
    lhs, rhs = _operands(SHAPES[0])
    with pytest.raises(ValueError, match="not one of"):
        grouped_matmul(lhs, rhs, jnp.zeros(5, jnp.int32), implementation="fast")


@given(st.integers(1, 10**6), st.integers(1, 8192), st.integers(1, 8192))
def test_tiles_are_lanes_of_128_and_bounded(m, k, n):
    tiles = tile_sizes(m, k, n)
    assert all(t % 128 == 0 for t in tiles)
    assert tiles[0] <= 512 and tiles[1] <= 1024 and tiles[2] <= 1024
