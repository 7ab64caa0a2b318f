"""Both ends of the model per device: looking tokens up in the embedding, and the loss over the vocabulary.

The table is cut over fsdp along d_model and over tensor along the vocabulary. It is gathered over fsdp
inside, so that its gradient is summed and cut in one reduce-scatter instead of an all-reduce of the whole.
Legend: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax.ops.cross_entropy import cross_entropy, cross_entropy_and_gradients
from moe_jax.parallel.dispatch import TOKENS
from moe_jax.parallel.mesh import platform
from moe_jax.parallel.rules import BATCH_AXES, spec

TABLE = spec(("vocab", "embed"))


def _whole_rows(table_VD: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.all_gather(table_VD, "fsdp", axis=1, tiled=True) if mesh.shape["fsdp"] > 1 else table_VD


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(table_VD: jax.Array, ids_BS: jax.Array, rows: int) -> jax.Array:
    """Rows of the table, which has so many; zero for ids outside it."""
    return table_VD.at[ids_BS].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _take_backward(rows, ids_BS, grad_BSD):
    # In float32: a frequent token's sum of thousands of bfloat16 gradients would stop growing.
    total = jnp.zeros((rows, grad_BSD.shape[-1]), jnp.float32)
    total = total.at[ids_BS].add(grad_BSD.astype(jnp.float32), mode="drop", wrap_negative_indices=False)
    return total.astype(grad_BSD.dtype), None


_take.defvjp(lambda table_VD, ids_BS, rows: (_take(table_VD, ids_BS, rows), ids_BS), _take_backward)


def look_up(table_VD: jax.Array, ids_BS: jax.Array, mesh: Mesh) -> jax.Array:
    """[B, S, D] in the table's type."""

    def body(table_VD, ids_BS):
        first = jax.lax.axis_index("tensor") * table_VD.shape[0]
        x_BSD = _take(_whole_rows(table_VD, mesh), ids_BS - first, table_VD.shape[0])
        if mesh.shape["tensor"] > 1:
            x_BSD = jax.lax.psum_scatter(x_BSD, "tensor", scatter_dimension=1, tiled=True)
        return x_BSD

    return jax.shard_map(
        body, mesh=mesh, in_specs=(TABLE, PartitionSpec(BATCH_AXES, "context")), out_specs=TOKENS, check_vma=False
    )(table_VD, ids_BS)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _local_loss(hidden_TD, table_VD, targets_T, weight_T, mesh: Mesh, chunk: int) -> jax.Array:
    return cross_entropy(hidden_TD, _whole_rows(table_VD, mesh), targets_T, weight_T, *_options(mesh, chunk))


def _local_loss_forward(hidden_TD, table_VD, targets_T, weight_T, mesh, chunk):
    total, grad_hidden, grad_rows = cross_entropy_and_gradients(
        hidden_TD, _whole_rows(table_VD, mesh), targets_T, weight_T, *_options(mesh, chunk)
    )
    grad_table = grad_rows.astype(table_VD.dtype)
    if mesh.shape["fsdp"] > 1:
        grad_table = jax.lax.psum_scatter(grad_table, "fsdp", scatter_dimension=1, tiled=True)
    # Together: or the compiler would keep the whole gradient of the table through the layers' backward pass.
    return total, jax.lax.optimization_barrier((grad_hidden, grad_table))


def _local_loss_backward(mesh, chunk, grads, upstream):
    grad_hidden, grad_table = ((g * upstream).astype(g.dtype) for g in grads)
    return grad_hidden, grad_table, None, None


_local_loss.defvjp(_local_loss_forward, _local_loss_backward)


def _options(mesh: Mesh, chunk: int) -> tuple[int, str | None, bool]:
    return chunk, "tensor" if mesh.shape["tensor"] > 1 else None, platform(mesh) == "tpu"


def next_token_loss(
    hidden_BSD: jax.Array, table_VD: jax.Array, targets_BS: jax.Array, weight_BS: jax.Array, mesh: Mesh, chunk: int
) -> jax.Array:
    """Sum of weight * -log p(target) in nats, with the logits of at most `chunk` tokens per device at a time."""

    def body(hidden_BSD, table_VD, targets_BS, weight_BS):
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        targets_T, weight_T = targets_BS.reshape(-1), weight_BS.reshape(-1)
        return _local_loss(hidden_TD, table_VD, targets_T, weight_T, mesh, min(chunk, targets_T.size))[None]

    tokens = PartitionSpec(BATCH_AXES, "context")
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(*tokens, None), TABLE, tokens, tokens),
        out_specs=PartitionSpec((*BATCH_AXES, "context", "tensor")),
        check_vma=False,
    )(hidden_BSD, table_VD, targets_BS, weight_BS).sum()
