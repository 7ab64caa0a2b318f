"""Transport of tokens to experts and back: what happens per device between the router and the residual.

The transport never knows what an expert computes. With the expert axis at 1 it is local; above 1 it is a
ring in the sense of all-gather and psum-scatter: every device of a group sees the group's tokens, works on
the pairs of its own experts, and the partial sums are scattered back. Dropless unless told otherwise; what
is dropped is counted.

Rows are sorted by expert and each expert starts at a multiple of `align`, the row tile of the grouped
product, so that no tile is computed for two experts. Rows between one expert's last and the next one's
first are holes: they carry the weight 0, so that what is dropped can be read back from one as zeros.
Nobody reads the uninitialised rows after the last expert.
Legend: B batch, S sequence, T tokens of a device, D model, K experts per token, P pairs (K * T, choice by
choice, so that a sum over K adds whole blocks), R rows (P + holes), E experts, BC pairs in blocks of C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from moe_jax.chips import LANES
from moe_jax.config import MoEConfig
from moe_jax.parallel.rules import BATCH_AXES, spec

# rows_RD, routing_R (weights of the rows), group_sizes_E, *weights -> rows_RD, each times its routing weight
Experts = Callable[..., jax.Array]
WEIGHT_AXES = (("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed"))
PASS_PAIRS = 65_536
TOKENS = PartitionSpec(BATCH_AXES, ("context", "tensor"), None)


class Plan(NamedTuple):
    """Which pair each row holds, where each pair's row is, which pairs have one; and the rows per expert.

    `pair_R` is P at holes, `row_KT` a hole where the pair was dropped. `sizes_E` counts holes, so that each
    expert starts at a multiple of the tile.
    """

    pair_R: jax.Array
    row_KT: jax.Array
    kept_KT: jax.Array
    sizes_E: jax.Array


def plan_rows(
    ids_KT: jax.Array, num_experts: int, *, align: int = 1, capacity: int | None = None, rows: int | None = None
) -> Plan:
    """Sort the pairs by expert; ids equal to `num_experts` go nowhere.

    With `capacity` each expert keeps its first so many pairs, first choices before second ones. `rows`
    bounds the pairs of all experts together (before alignment); what does not fit is taken from the experts
    that have most.
    """
    ids_P = ids_KT.reshape(-1)
    pairs = ids_P.size
    member_EBC, rank_EBC = _ranks(ids_P, num_experts)
    kept_E = member_EBC.sum((1, 2), dtype=jnp.int32)
    if capacity is not None:
        kept_E = jnp.minimum(kept_E, capacity)
    rows = pairs if rows is None else min(rows, pairs)
    if rows < pairs:
        kept_E = jnp.minimum(kept_E, _level(kept_E, rows))
    # The last expert has a hole to spare: where pairs that went nowhere are read, as zeros.
    sizes_E = -(-kept_E.at[-1].add(1) // align) * align
    start_E = jnp.cumsum(sizes_E) - sizes_E

    kept_EBC = member_EBC & (rank_EBC < kept_E[:, None, None])
    kept_P = kept_EBC.any(0).reshape(-1)[:pairs]
    row_P = jnp.where(kept_EBC, rank_EBC + start_E[:, None, None], 0).sum(0).reshape(-1)[:pairs]
    row_P = jnp.where(kept_P, row_P, sizes_E.sum() - 1)
    buffer = -(-rows // align) * align + num_experts * align
    pair_P = jnp.arange(pairs, dtype=jnp.int32)
    target_P = jnp.where(kept_P, row_P, buffer + pair_P)
    pair_R = jnp.full(buffer, pairs, jnp.int32).at[target_P].set(pair_P, mode="drop", unique_indices=True)
    return Plan(pair_R, row_P.reshape(ids_KT.shape), kept_P.reshape(ids_KT.shape), sizes_E)


def _level(counts_E: jax.Array, total: int) -> jax.Array:
    """The largest bound of each count under which the counts add up to `total` at most."""
    sorted_E, left_E = jnp.sort(counts_E), jnp.arange(counts_E.size, 0, -1)
    room_E = total - (jnp.cumsum(sorted_E) - sorted_E)  # for this count and all larger ones
    above_E = sorted_E > room_E // left_E
    return jnp.where(above_E.any(), (room_E // left_E)[jnp.argmax(above_E)], sorted_E[-1])


def _ranks(ids_P: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """(member, rank) of each expert and pair, [E, P / 128, 128]: a counting sort in dense operations.

    The running count within 128 pairs is a product with a triangle of ones, exact in any precision; TPUs
    sort and scatter scalars slowly, and compile sorts slowly.
    """
    ids_BC = jnp.pad(ids_P, (0, -ids_P.size % LANES), constant_values=num_experts).reshape(-1, LANES)
    member_EBC = ids_BC == jnp.arange(num_experts)[:, None, None]
    triangle = jnp.triu(jnp.ones((LANES, LANES), jnp.float32))
    seen_EBC = (member_EBC.astype(jnp.float32) @ triangle).astype(jnp.int32)
    blocks_EB = seen_EBC[..., -1]
    before_EB = jnp.cumsum(blocks_EB, axis=1) - blocks_EB
    return member_EBC, seen_EBC + before_EB[..., None] - 1


@jax.custom_vjp
def _take_rows(x_TD: jax.Array, plan: Plan) -> jax.Array:
    """Row r is the token of pair_R[r]; any token at holes. Its transpose is `_sum_rows`, not a scatter-add."""
    return x_TD[plan.pair_R % x_TD.shape[0]]


@jax.custom_vjp
def _sum_rows(rows_RD: jax.Array, plan: Plan) -> jax.Array:
    """Per token the float32 sum of its rows, [T, D] in the type of `rows`. Its transpose is `_take_rows`."""
    # Block by block: as one reduction over K, XLA takes several times as long.
    first_T, *others_KT = plan.row_KT
    total_TD = rows_RD[first_T].astype(jnp.float32)
    for row_T in others_KT:
        total_TD += rows_RD[row_T].astype(jnp.float32)
    return total_TD.astype(rows_RD.dtype)


_take_rows.defvjp(
    lambda x_TD, plan: (_take_rows(x_TD, plan), plan), lambda plan, grad_RD: (_sum_rows(grad_RD, plan), None)
)
_sum_rows.defvjp(
    lambda rows_RD, plan: (_sum_rows(rows_RD, plan), plan), lambda plan, grad_TD: (_take_rows(grad_TD, plan), None)
)


@jax.custom_vjp
def _take_routing(routing_KT: jax.Array, plan: Plan) -> jax.Array:
    """The weight of each row's pair, 0 at holes."""
    return routing_KT.reshape(-1).at[plan.pair_R].get(mode="fill", fill_value=0)


_take_routing.defvjp(
    lambda routing_KT, plan: (_take_routing(routing_KT, plan), plan),
    lambda plan, grad_R: (jnp.where(plan.kept_KT, grad_R[plan.row_KT], 0), None),
)


def run_local(experts: Experts, weights, x_TD, routing_KT, plan: Plan):
    """Dispatch, experts, combine on one device: (y_TD, kept pairs int32)."""
    rows_RD = checkpoint_name(_take_rows(x_TD, plan), "dispatch")
    rows_RD = experts(rows_RD, _take_routing(routing_KT, plan), plan.sizes_E, *weights)
    return _sum_rows(rows_RD, plan), plan.kept_KT.sum(dtype=jnp.int32)


def through_experts(
    experts: Experts,
    weights: tuple[jax.Array, jax.Array],
    x_BSD: jax.Array,
    ids_BSK: jax.Array,
    routing_BSK: jax.Array,
    moe: MoEConfig,
    mesh: Mesh,
    align: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """sum_k routing_k * expert_{ids_k}(x) for every token, and the number of pairs that were computed.

    `ids_BSK` of `num_experts` marks a pair that goes nowhere (padding). `weights` are gate|up [E, D, 2F] and
    down [E, F, D], cut over fsdp along D and over expert along E; they are gathered over fsdp inside, so the
    gather is redone in the backward pass instead of being kept or hoisted out of the layer scan. Experts see
    down transposed, [E, D, F]: it is gathered along rows, which needs no copy of the whole.
    The tokens are cut over `context` and `tensor` too: no device computes a pair that another one does.
    """
    group = mesh.shape["expert"]
    local_experts = moe.num_experts // group

    def body(weights, x_BSD, ids_BSK, routing_BSK):
        gate_up, down = weights
        down = down.swapaxes(1, 2)
        if mesh.shape["fsdp"] > 1:
            gate_up, down = (jax.lax.all_gather(w, "fsdp", axis=1, tiled=True) for w in (gate_up, down))
        x, ids, routing = (a.reshape(-1, a.shape[-1]) for a in (x_BSD, ids_BSK, routing_BSK))
        if group > 1:
            x, ids, routing = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, ids, routing))
            ids = ids - jax.lax.axis_index("expert") * local_experts
            ids = jnp.where((ids >= 0) & (ids < local_experts), ids, local_experts)

        def one_pass(x_TD, ids_TK, routing_TK):
            plan = plan_rows(ids_TK.T, local_experts, align=align, **_bounds(moe, ids_TK.shape[0], group))
            return run_local(experts, (gate_up, down), x_TD, routing_TK.T, plan)

        y_TD, kept = _in_passes(one_pass, x, ids, routing)
        if group > 1:
            y_TD = jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)
        # One count per device: a sum in here returned as replicated could not be checked.
        return y_TD.reshape(x_BSD.shape).astype(x_BSD.dtype), kept[None]

    y_BSD, kept = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(tuple(spec(axes) for axes in WEIGHT_AXES), TOKENS, TOKENS, TOKENS),
        out_specs=(TOKENS, PartitionSpec((*BATCH_AXES, "context", "tensor"))),
        check_vma=False,  # megablox has no replication types; every output above is cut by tokens
    )(weights, x_BSD, ids_BSK, routing_BSK)
    return y_BSD, kept.sum()


def number_of_passes(tokens: int, per_token: int) -> int:
    """How often the experts run for so many tokens of an expert group: the fewest equal parts below PASS_PAIRS.

    One where only very small parts would be equal, as for a prime number of tokens.
    """
    wanted = -(-tokens * per_token // PASS_PAIRS)
    return next((n for n in range(wanted, 4 * wanted + 1) if tokens % n == 0), 1)


def _in_passes(one_pass: Callable, x_TD: jax.Array, ids_TK: jax.Array, routing_TK: jax.Array):
    """`one_pass` over so few tokens at a time that the rows of a pass stay below PASS_PAIRS.

    Beyond that, larger products are no faster; only their rows, several arrays of them, take more memory.
    """
    passes = number_of_passes(*ids_TK.shape)
    if passes == 1:
        return one_pass(x_TD, ids_TK, routing_TK)
    again = jax.checkpoint(lambda xs: one_pass(*xs), prevent_cse=False)
    y, kept = jax.lax.map(again, tuple(a.reshape(passes, -1, a.shape[-1]) for a in (x_TD, ids_TK, routing_TK)))
    return y.reshape(x_TD.shape), kept.sum()


def _bounds(moe: MoEConfig, tokens: int, group: int) -> dict[str, int | None]:
    """What `plan_rows` may keep of the `tokens` of an expert group in one pass: per expert, and per device."""
    mean = tokens * moe.num_experts_per_tok / moe.num_experts
    capacity = math.ceil(min(moe.capacity_factor * mean, tokens)) if moe.dispatch == "drop_and_pad" else None
    local_experts = moe.num_experts // group
    if moe.buffer_factor and group > 1:
        rows = min(moe.buffer_factor * mean, tokens) * local_experts
        return {"capacity": capacity, "rows": math.ceil(rows)}
    return {"capacity": capacity, "rows": capacity and capacity * local_experts}
