"""A product with a weight that is cut over the mesh: gathered over fsdp where it is used, summed over tensor.

Written per device, so that the gradient of the weight is summed and cut by one reduce-scatter; left to the
compiler it is an all-reduce of the whole, or a product cut into a ring of small ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax.parallel.rules import spec

Axes = tuple[str, ...]


def gather_whole(w: jax.Array, axes: Axes, mesh: Mesh) -> jax.Array:
    """Inside shard_map: a weight of logical `axes`, whole along fsdp."""
    for dimension, mesh_axis in enumerate(spec(axes)):
        if mesh_axis == "fsdp" and mesh.shape["fsdp"] > 1:
            w = jax.lax.all_gather(w, "fsdp", axis=dimension, tiled=True)
    return w


def product(
    formula: str, x: jax.Array, w: jax.Array, mesh: Mesh, x_axes: Axes, w_axes: Axes, out_axes: Axes, **einsum
) -> jax.Array:
    """einsum(formula, x, w) of arrays with these logical axes, in the type of einsum.

    A dimension cut over `tensor` that the product sums leaves partial sums: they are scattered along the
    output's "sequence" axis, which the residual stream gathers again.
    """
    if mesh.size == 1:
        return jnp.einsum(formula, x, w, **einsum)
    partial_sums = "tensor" in spec(x_axes) and "tensor" in spec(w_axes) and mesh.shape["tensor"] > 1
    sequence = out_axes.index("sequence")
    out = list(spec(out_axes))
    if partial_sums:
        out[sequence] = ("context", "tensor")

    def body(x, w):
        y = jnp.einsum(formula, x, gather_whole(w, w_axes, mesh), **einsum)
        return jax.lax.psum_scatter(y, "tensor", scatter_dimension=sequence, tiled=True) if partial_sums else y

    return jax.shard_map(
        body, mesh=mesh, in_specs=(spec(x_axes), spec(w_axes)), out_specs=PartitionSpec(*out), check_vma=False
    )(x, w)
