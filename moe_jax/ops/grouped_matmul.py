"""Grouped matrix product: rows sorted by group, each group times its own matrix.

One function, three implementations that agree in value and gradient: megablox (Pallas kernels, TPU), a
tile loop (CPU, where `lax.ragged_dot` expands to a dense masked product), and a dense reference for tests.
Rows past sum(group_sizes) belong to no group. Megablox leaves them uninitialised: whoever reads rows back
must pick those of groups (`parallel/dispatch.py` does), since masking them here costs a pass over all rows.
Legend: M rows, K reduction, N columns, E groups.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moe_jax.chips import LANES

IMPLEMENTATIONS = ("megablox", "tiles", "dense")


def implementation_for(platform: str) -> str:
    """The implementation for the platform of the *mesh*, which need not be the process's own (ahead-of-time)."""
    return "megablox" if platform == "tpu" else "tiles"


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str,
    transpose_rhs: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Multiply the first `group_sizes[0]` rows by `rhs[0]`, the next by `rhs[1]`, and so on.

    `group_sizes_E` is int32 with a sum of at most M; rows past the sum give no gradient, and what comes out
    in their place is undefined. With `transpose_rhs`, `rhs` is [E, N, K]. Accumulates in float32 and answers
    in the type of `lhs`. `interpret` runs the Pallas kernel on CPU, for tests.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "megablox":
        return _megablox(lhs_MK, rhs_EKN, group_sizes_E, transpose_rhs, interpret)
    if transpose_rhs:
        rhs_EKN = rhs_EKN.swapaxes(1, 2)
    if implementation == "tiles":
        return _tiles(lhs_MK, rhs_EKN, group_sizes_E)
    return _dense(lhs_MK, rhs_EKN, group_sizes_E)


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

ROW_TILE = LANES


def row_alignment(implementation: str) -> int:
    """Groups that start at a multiple of this many rows are computed without visiting a tile twice."""
    return ROW_TILE if implementation == "megablox" else 1


def tile_sizes(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Megablox tiles (m, k, n) for a product of this shape: 128 rows, at most 1024 x 1024 of a matrix.

    A group of fine-grained experts has some thousand rows: with taller tiles the part-filled last one costs
    more than it saves. Consecutive tiles of a group keep its matrix in VMEM if one tile covers it. A longer
    side is cut evenly (1280 into 2 x 640), since tiles run whole.
    """

    def even(limit: int, size: int) -> int:
        tiles = -(-size // limit)
        return -(-size // (tiles * LANES)) * LANES

    return even(ROW_TILE, min(m, ROW_TILE)), even(1024, k), even(1024, n)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gmm(lhs_MK: jax.Array, rhs: jax.Array, sizes_E: jax.Array, transpose_rhs: bool, interpret: bool) -> jax.Array:
    return gmm(lhs_MK, rhs, sizes_E, lhs_MK.dtype, tile_sizes, transpose_rhs=transpose_rhs, interpret=interpret)


def _gmm_forward(lhs_MK, rhs, sizes_E, transpose_rhs, interpret):
    return _gmm(lhs_MK, rhs, sizes_E, transpose_rhs, interpret), (lhs_MK, rhs, sizes_E)


def _gmm_backward(transpose_rhs, interpret, residuals, grad_MN):
    lhs_MK, rhs, sizes_E = residuals
    grad_lhs = _gmm(grad_MN, rhs, sizes_E, not transpose_rhs, interpret)
    # The gradient comes out in the layout of `rhs`, rather than being transposed after the kernel.
    left, right = (grad_MN, lhs_MK) if transpose_rhs else (lhs_MK, grad_MN)
    grad_rhs = tgmm(left.swapaxes(0, 1), right, sizes_E, rhs.dtype, tile_sizes, interpret=interpret)
    return grad_lhs, grad_rhs, None


_gmm.defvjp(_gmm_forward, _gmm_backward)


def _megablox(lhs_MK, rhs, sizes_E, transpose_rhs: bool, interpret: bool) -> jax.Array:
    rows = lhs_MK.shape[0]
    padded = jnp.pad(lhs_MK, ((0, -rows % tile_sizes(rows, 1, 1)[0]), (0, 0)))
    return _gmm(padded, rhs, sizes_E.astype(jnp.int32), transpose_rhs, interpret)[:rows]


# ---- tile loop ----------------------------------------------------------------------------------


def _tile_rows(rows: int, groups: int) -> int:
    """Rows of a CPU tile: the largest power of two within the mean group, from 16 to 128."""
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
    return out[:rows]


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
            jnp.where(inside, x, 0),
            jnp.where(inside, g, 0),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        so_far = jax.lax.dynamic_index_in_dim(out, group[i], keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(out, so_far + part[None], group[i], 0)

    zeros = jnp.zeros((groups, lhs_MK.shape[1], grad_MN.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, count, body, zeros)


@jax.custom_vjp
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
