"""Grouped matrix product: rows sorted by group, each group times its own matrix.

One function, three implementations that agree in value and gradient: megablox (Pallas kernels, TPU), a
tile loop (CPU, where `lax.ragged_dot` expands to a dense masked product), and a dense reference for tests.
Padding of M and the masking of rows past sum(group_sizes), which megablox leaves uninitialised, live here.
Legend: M rows, K reduction, N columns, E groups.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox import gmm

IMPLEMENTATIONS = ("megablox", "tiles", "dense")


def implementation_for(platform: str) -> str:
    """The implementation for the platform of the *mesh*, which need not be the process's own (ahead-of-time)."""
    return "megablox" if platform == "tpu" else "tiles"


def grouped_matmul(
    lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array, *, implementation: str, interpret: bool = False
) -> jax.Array:
    """Multiply the first `group_sizes[0]` rows by `rhs[0]`, the next by `rhs[1]`, and so on.

    `group_sizes_E` is int32 with a sum of at most M; rows past the sum come out as zeros and give no
    gradient. Accumulates in float32 and answers in the type of `lhs`. `interpret` runs the Pallas kernel
    on CPU, for tests.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "megablox":
        return _megablox(lhs_MK, rhs_EKN, group_sizes_E, interpret)
    if implementation == "tiles":
        return _tiles(lhs_MK, rhs_EKN, group_sizes_E)
    return _dense(lhs_MK, rhs_EKN, group_sizes_E)


def _valid_rows(rows: int, sizes_E: jax.Array) -> jax.Array:
    return (jnp.arange(rows) < sizes_E.sum())[:, None]


def _dense(lhs_MK: jax.Array, rhs_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every row times every group's matrix, all but its own masked: the definition, for tests."""
    ends_E = jnp.cumsum(sizes_E)
    rows_M = jnp.arange(lhs_MK.shape[0])
    member_ME = (rows_M[:, None] < ends_E) & (rows_M[:, None] >= ends_E - sizes_E)
    product = jnp.einsum(
        "mk,ekn,me->mn", lhs_MK, rhs_EKN, member_ME.astype(lhs_MK.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return product.astype(lhs_MK.dtype)


# ---- megablox -----------------------------------------------------------------------------------


def tile_sizes(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Megablox tiles (m, k, n) for a product of this shape: lanes of 128, at most 512 x 1024 x 1024."""

    def up_to(limit: int, size: int) -> int:
        return min(limit, -(-size // 128) * 128)

    return up_to(512, m), up_to(1024, k), up_to(1024, n)


def _megablox(lhs_MK: jax.Array, rhs_EKN: jax.Array, sizes_E: jax.Array, interpret: bool) -> jax.Array:
    rows = lhs_MK.shape[0]
    tile_m = tile_sizes(rows, *rhs_EKN.shape[1:])[0]
    padded = jnp.pad(lhs_MK, ((0, -rows % tile_m), (0, 0)))
    # Masked on both sides: the output's tail, and through the transpose of this `where` the gradient's,
    # is uninitialised memory, and a zero weight times NaN is NaN.
    valid = _valid_rows(padded.shape[0], sizes_E)
    product = gmm(
        jnp.where(valid, padded, 0),
        rhs_EKN,
        sizes_E.astype(jnp.int32),
        preferred_element_type=lhs_MK.dtype,
        tiling=tile_sizes,
        interpret=interpret,
    )
    return jnp.where(valid, product, 0)[:rows]


# ---- tile loop ----------------------------------------------------------------------------------


def _tile_rows(rows: int, groups: int) -> int:
    """Rows of a CPU tile: a power of two near half the mean group, so that few rows are computed twice."""
    mean = max(1, rows // groups)
    return int(np.clip(2 ** int(np.log2(max(1, mean))), 16, 128))


def _tile_plan(rows: int, sizes_E: jax.Array, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(group, first row, number of tiles): tiles in row order, none straddling a group's start."""
    tiles_E = -(-sizes_E // tile)
    ends_E = jnp.cumsum(tiles_E)
    limit = rows // tile + sizes_E.shape[0]
    index = jnp.arange(limit)
    group = jnp.minimum(jnp.searchsorted(ends_E, index, side="right"), sizes_E.shape[0] - 1)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    first = starts_E[group] + (index - (ends_E - tiles_E)[group]) * tile
    return group, first, ends_E[-1]


def _tile_product(lhs_MK: jax.Array, rhs_EKN: jax.Array, sizes_E: jax.Array, transpose: bool) -> jax.Array:
    rows, tile = lhs_MK.shape[0], _tile_rows(lhs_MK.shape[0], rhs_EKN.shape[0])
    group, first, count = _tile_plan(rows, sizes_E, tile)
    padded = jnp.pad(lhs_MK, ((0, tile), (0, 0)))
    width = rhs_EKN.shape[1 if transpose else 2]
    contraction = (((1,), (1 if transpose else 0,)), ((), ()))

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(padded, first[i], tile)
        w = jax.lax.dynamic_index_in_dim(rhs_EKN, group[i], keepdims=False)
        y = jax.lax.dot_general(x, w, contraction, preferred_element_type=jnp.float32)
        # A tile's rows past its group's end are overwritten by the next group's first tile.
        return jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), first[i], 0)

    out = jax.lax.fori_loop(0, count, body, jnp.zeros((rows + tile, width), lhs_MK.dtype))
    return jnp.where(_valid_rows(rows, sizes_E), out[:rows], 0)


def _tile_weight_gradient(lhs_MK: jax.Array, grad_MN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Per group the transpose of its rows times the rows of `grad`: float32 [E, K, N]."""
    rows, groups = lhs_MK.shape[0], sizes_E.shape[0]
    tile = _tile_rows(rows, groups)
    group, first, count = _tile_plan(rows, sizes_E, tile)
    ends_E = jnp.cumsum(sizes_E)
    lhs, grad = (jnp.pad(a, ((0, tile), (0, 0))) for a in (lhs_MK, grad_MN))

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(lhs, first[i], tile)
        g = jax.lax.dynamic_slice_in_dim(grad, first[i], tile)
        inside = (first[i] + jnp.arange(tile) < ends_E[group[i]])[:, None]
        part = jax.lax.dot_general(
            jnp.where(inside, x, 0), g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        so_far = jax.lax.dynamic_index_in_dim(out, group[i], keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(out, so_far + part[None], group[i], 0)

    zeros = jnp.zeros((groups, lhs_MK.shape[1], grad_MN.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, count, body, zeros)


@partial(jax.custom_vjp)
def _tiles(lhs_MK: jax.Array, rhs_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _tile_product(lhs_MK, rhs_EKN, sizes_E, transpose=False)


def _tiles_forward(lhs_MK, rhs_EKN, sizes_E):
    return _tiles(lhs_MK, rhs_EKN, sizes_E), (lhs_MK, rhs_EKN, sizes_E)


def _tiles_backward(residuals, grad_MN):
    lhs_MK, rhs_EKN, sizes_E = residuals
    grad_lhs = _tile_product(grad_MN, rhs_EKN, sizes_E, transpose=True)
    grad_rhs = _tile_weight_gradient(lhs_MK, grad_MN, sizes_E).astype(rhs_EKN.dtype)
    return grad_lhs.astype(lhs_MK.dtype), grad_rhs, np.zeros(sizes_E.shape, jax.dtypes.float0)


_tiles.defvjp(_tiles_forward, _tiles_backward)
