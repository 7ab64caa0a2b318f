"""Transport of tokens to experts and back: what happens per device between the router and the residual.

The transport never knows what an expert computes. With the expert axis at 1 it is local and dropless; above
1 it is a ring in the sense of all-gather and psum-scatter: every device of a group sees the group's tokens,
works on the pairs of its own experts, and the partial sums are scattered back. Dropless either way, since
the buffer holds the worst case; `drop_and_pad` bounds it per expert and counts what it drops.
Legend: B batch, S sequence, T tokens of a device, D model, K experts per token, R routed rows, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax.config import MoEConfig
from moe_jax.parallel.rules import BATCH_AXES, spec

# rows_RD, group_sizes_E, *weights -> rows_RD
Experts = Callable[..., jax.Array]
WEIGHT_AXES = (("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed"))


class Plan(NamedTuple):
    """Where each (token, choice) pair's row went: `slot_TK` indexes rows; `kept_TK` is false where dropped."""

    slot_TK: jax.Array
    kept_TK: jax.Array


@jax.custom_vjp
def _take_rows(x_TD: jax.Array, pair_R: jax.Array, slot_TK: jax.Array, kept_TK: jax.Array):
    """Row r is token pair_R[r] // K. Its transpose is a gather and a sum over K, not a scatter-add."""
    return x_TD[pair_R // slot_TK.shape[1]]


def _take_rows_forward(x_TD, pair_R, slot_TK, kept_TK):
    return _take_rows(x_TD, pair_R, slot_TK, kept_TK), (slot_TK, kept_TK)


def _take_rows_backward(residuals, grad_RD):
    slot_TK, kept_TK = residuals
    grad_TKD = jnp.where(kept_TK[..., None], grad_RD[slot_TK], 0)
    grad_TD = grad_TKD.astype(jnp.float32).sum(1).astype(grad_RD.dtype)
    return grad_TD, None, None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def _return_rows(rows_RD: jax.Array, pair_R: jax.Array, slot_TK: jax.Array, kept_TK: jax.Array):
    """[T, K, D]: each pair's row, zero where dropped. Its transpose is a gather as well."""
    return jnp.where(kept_TK[..., None], rows_RD[slot_TK], 0)


def _return_rows_forward(rows_RD, pair_R, slot_TK, kept_TK):
    return _return_rows(rows_RD, pair_R, slot_TK, kept_TK), (pair_R, slot_TK, kept_TK)


def _return_rows_backward(residuals, grad_TKD):
    pair_R, slot_TK, kept_TK = residuals
    pairs = grad_TKD.reshape(-1, grad_TKD.shape[-1])
    held_R = (slot_TK.reshape(-1)[pair_R] == jnp.arange(pair_R.shape[0])) & kept_TK.reshape(-1)[pair_R]
    return jnp.where(held_R[:, None], pairs[pair_R], 0), None, None, None


_return_rows.defvjp(_return_rows_forward, _return_rows_backward)


def plan_rows(ids_TK: jax.Array, num_experts: int, capacity: int | None):
    """Sort the pairs by expert: (pair_R, group_sizes_E, Plan); ids equal to `num_experts` go nowhere.

    Without `capacity` the rows are the pairs in order of expert (ties by token). With it each expert has
    exactly `capacity` rows, and a pair of higher rank than that is dropped.
    """
    ids = ids_TK.reshape(-1)
    order = jnp.argsort(ids, stable=True)
    sizes_E = jnp.zeros(num_experts, jnp.int32).at[ids].add(1, mode="drop")
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    real = ids < num_experts
    if capacity is None:
        plan = Plan(position.reshape(ids_TK.shape), real.reshape(ids_TK.shape))
        return order, sizes_E, plan
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    rank = position - starts_E[jnp.minimum(ids, num_experts - 1)]
    kept = real & (rank < capacity)
    slot = jnp.where(kept, ids * capacity + rank, 0)
    source = starts_E[:, None] + jnp.minimum(jnp.arange(capacity), jnp.maximum(sizes_E - 1, 0)[:, None])
    pair_R = order[jnp.minimum(source.reshape(-1), order.size - 1)]
    plan = Plan(slot.reshape(ids_TK.shape), kept.reshape(ids_TK.shape))
    return pair_R, jnp.full(num_experts, capacity, jnp.int32), plan


def run_local(experts: Experts, weights, x_TD, ids_TK, mix_TK, num_experts: int, capacity: int | None):
    """Dispatch, experts, combine on one device: (y_TD float32, kept pairs int32)."""
    pair_R, sizes_E, plan = plan_rows(ids_TK, num_experts, capacity)
    rows_RD = experts(_take_rows(x_TD, pair_R, *plan), sizes_E, *weights)
    back_TKD = _return_rows(rows_RD, pair_R, *plan)
    y_TD = jnp.einsum("tkd,tk->td", back_TKD, mix_TK, preferred_element_type=jnp.float32)
    return y_TD, plan.kept_TK.sum(dtype=jnp.int32)


def through_experts(
    experts: Experts,
    weights: tuple[jax.Array, jax.Array],
    x_BSD: jax.Array,
    ids_BSK: jax.Array,
    mix_BSK: jax.Array,
    moe: MoEConfig,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """sum_k mix_k * expert_{ids_k}(x) for every token, and the number of pairs that were computed.

    `ids_BSK` of `num_experts` marks a pair that goes nowhere (padding). `weights` are gate|up [E, D, 2F] and
    down [E, F, D], cut over fsdp along D and over expert along E; they are gathered over fsdp inside, so the
    gather is redone in the backward pass instead of being kept or hoisted out of the layer scan.
    """
    group = mesh.shape["expert"]
    local_experts = moe.num_experts // group

    def body(weights, x_BSD, ids_BSK, mix_BSK):
        gate_up, down = weights
        if mesh.shape["fsdp"] > 1:
            gate_up = jax.lax.all_gather(gate_up, "fsdp", axis=1, tiled=True)
            down = jax.lax.all_gather(down, "fsdp", axis=2, tiled=True)
        shape = x_BSD.shape
        x, ids, mix = (a.reshape(-1, a.shape[-1]) for a in (x_BSD, ids_BSK, mix_BSK))
        if group > 1:
            x, ids, mix = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, ids, mix))
            ids = ids - jax.lax.axis_index("expert") * local_experts
            ids = jnp.where((ids >= 0) & (ids < local_experts), ids, local_experts)
        y_TD, kept = run_local(experts, (gate_up, down), x, ids, mix, local_experts, _capacity(moe, ids.shape[0]))
        if group > 1:
            y_TD = jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)
        # One count per device: a sum in here returned as replicated could not be checked.
        return y_TD.reshape(shape).astype(x_BSD.dtype), kept[None]

    tokens = PartitionSpec(BATCH_AXES, None, None)
    y_BSD, kept = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(tuple(spec(axes) for axes in WEIGHT_AXES), tokens, tokens, tokens),
        out_specs=(tokens, PartitionSpec(BATCH_AXES)),
        check_vma=False,  # megablox has no replication types; every output above is cut by tokens
    )(weights, x_BSD, ids_BSK, mix_BSK)
    return y_BSD, kept.sum()


def _capacity(moe: MoEConfig, tokens: int) -> int | None:
    if moe.dispatch == "dropless":
        return None
    return math.ceil(moe.capacity_factor * tokens * moe.num_experts_per_tok / moe.num_experts)
