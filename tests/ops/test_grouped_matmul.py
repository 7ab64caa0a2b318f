"""Three implementations of the grouped product, one meaning."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from moe_jax.ops.grouped_matmul import grouped_matmul, implementation_for, row_alignment, tile_sizes
from tests.tiny import quick

# Shapes are few because each is compiled; group sizes are drawn freely, empty groups included.
SHAPES = [(96, 40, 24, 5), (200, 130, 72, 3), (64, 32, 136, 7)]


def _operands(shape, seed=0):
    rows, inner, columns, groups = shape
    rng = np.random.default_rng(seed)
    lhs = rng.standard_normal((rows, inner), np.float32)
    rhs = rng.standard_normal((groups, inner, columns), np.float32)
    return jnp.asarray(lhs), jnp.asarray(rhs)


@cache
def value_and_gradients(implementation, **kwargs):
    """(out, gradient of lhs, gradient of rhs) from (lhs, rhs, sizes, upstream gradient)."""

    def run(lhs, rhs, sizes, grad):
        out, transpose = jax.vjp(
            lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, implementation=implementation, **kwargs), lhs, rhs
        )
        return out, *transpose(grad)

    return quick(run)


def _assert_agree(implementation, shape, sizes, transpose_rhs=False):
    """Equal to the dense definition on the rows that belong to groups; the others are undefined."""
    lhs, rhs = _operands(shape)
    if transpose_rhs:
        rhs = rhs.swapaxes(1, 2)
    grad = jnp.asarray(np.random.default_rng(1).standard_normal((shape[0], shape[2]), np.float32))
    sizes, rows = jnp.asarray(sizes, jnp.int32), int(np.sum(sizes))
    options = {"interpret": True} if implementation == "megablox" else {}
    got = value_and_gradients(implementation, transpose_rhs=transpose_rhs, **options)(lhs, rhs, sizes, grad)
    want = value_and_gradients("dense", transpose_rhs=transpose_rhs)(lhs, rhs, sizes, grad)
    for a, b in zip((*(x[:rows] for x in got[:2]), got[2]), (*(x[:rows] for x in want[:2]), want[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)


@st.composite
def shapes_and_sizes(draw, shapes):
    shape = draw(st.sampled_from(shapes))
    rows, groups = shape[0], shape[3]
    total = draw(st.integers(0, rows))
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=groups - 1, max_size=groups - 1)))
    return shape, np.diff([0, *cuts, total])


@given(shapes_and_sizes(SHAPES), st.booleans())
@settings(max_examples=40)
def test_the_tile_loop_equals_the_reference_in_value_and_gradient(case, transpose_rhs):
    shape, sizes = case
    _assert_agree("tiles", shape, sizes, transpose_rhs)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("sizes", [[0, 0, 96, 0, 0], [20, 0, 31, 5, 0], [0, 0, 0, 0, 0], [16, 16, 16, 16, 32]])
def test_megablox_equals_the_reference_in_value_and_gradient(sizes, transpose_rhs):
    _assert_agree("megablox", SHAPES[0], sizes, transpose_rhs)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("sizes", [[100, 0, 60], [128, 0, 72], [0, 1, 0]])
def test_megablox_is_right_where_k_and_n_are_no_multiple_of_the_tile(sizes, transpose_rhs):
    _assert_agree("megablox", SHAPES[1], sizes, transpose_rhs)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("implementation", ["megablox", "tiles"])
def test_rows_that_belong_to_no_group_reach_nothing_else(implementation, transpose_rhs):
    """NaN in them on the way forward and back, and the kernel in memory that is NaN until written."""
    lhs, rhs = _operands(SHAPES[0])
    if transpose_rhs:
        rhs = rhs.swapaxes(1, 2)
    sizes, grad = jnp.asarray([20, 0, 25, 5, 0], jnp.int32), jnp.ones((96, 24))
    want = value_and_gradients("dense", transpose_rhs=transpose_rhs)(lhs, rhs, sizes, grad)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        run = value_and_gradients(implementation, transpose_rhs=transpose_rhs)
        got = run(lhs.at[50:].set(jnp.nan), rhs, sizes, grad.at[50:].set(jnp.nan))
    for a, b in zip((got[0][:50], got[1][:50], got[2]), (want[0][:50], want[1][:50], want[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)


def test_an_empty_group_gets_a_zero_gradient():
    lhs, rhs = _operands(SHAPES[0])
    for run in (value_and_gradients("tiles"), value_and_gradients("megablox", interpret=True)):
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
    assert all(t <= limit for t, limit in zip(tiles, (128, 1024, 1024), strict=True))
    assert all(t < size + 128 for t, size in zip(tiles, (m, k, n), strict=True))


def test_one_tile_covers_the_matrix_of_a_fine_grained_expert():
    """Consecutive row tiles of a group then find its matrix in VMEM: S's gate|up and down, both ways."""
    for k, n in [(768, 768), (384, 768), (768, 384)]:
        assert tile_sizes(131_072, k, n)[1:] == (k, n)


def test_groups_start_where_no_tile_is_shared():
    assert row_alignment("megablox") == tile_sizes(131_072, 768, 768)[0]
    assert row_alignment("tiles") == 1  # the loop's tiles start where a group does
