"""Causal attention with grouped key/value heads and document segments, plain JAX: all scores at once or blocked.

Legend: B batch, S queries, C keys (the cache's length in generation, else S), N query heads,
G key/value heads, P queries per key/value head (N / G), H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_MASKED = -1e30  # finite: a row of padding sees nothing, and softmax over -inf alone would be NaN


def causal_mask(
    query_positions_BS: jax.Array,
    key_positions_BC: jax.Array,
    query_segments_BS: jax.Array,
    key_segments_BC: jax.Array,
) -> jax.Array:
    """[B, S, C], true where a query may look: same document, not a later position."""
    same = query_segments_BS[:, :, None] == key_segments_BC[:, None, :]
    return same & (query_positions_BS[:, :, None] >= key_positions_BC[:, None, :])


def attention(q_BNHS: jax.Array, k_BGHC: jax.Array, v_BGHC: jax.Array, mask_BSC: jax.Array) -> jax.Array:
    """Softmax attention of scaled queries, scores and softmax in float32: [B, N, S, H]."""
    batch, heads, width, length = q_BNHS.shape
    q_BGPHS = q_BNHS.reshape(batch, k_BGHC.shape[1], -1, width, length)
    scores = jnp.einsum("bgphs,bghc->bgpsc", q_BGPHS, k_BGHC, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BSC[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGHC.dtype)
    out = jnp.einsum("bgpsc,bghc->bgpsh", weights, v_BGHC)
    return out.reshape(batch, heads, length, width)


# ---- blocked ------------------------------------------------------------------------------------

BLOCK = 128  # queries at a time: a block's scores stay in a core's cache, and later keys are never touched


@jax.custom_vjp
def blocked_attention(
    q_BNHS: jax.Array, k_BGHS: jax.Array, v_BGHS: jax.Array, positions_BS: jax.Array, segments_BS: jax.Array
) -> jax.Array:
    """`attention` of packed rows, where no query sees a later place of its row: [B, N, S, H].

    One row of the batch and one block of queries at a time; scores are recomputed in the backward pass, so
    that nothing of size S * S is ever written to memory. For CPU.
    """
    return _forward(q_BNHS, k_BGHS, v_BGHS, positions_BS, segments_BS)[0]


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Batched over the first axis of both, contracted over one other, float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _blocks(length: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, length)) for i in range(0, length, BLOCK)]


def _mask(positions_S: jax.Array, segments_S: jax.Array, block: slice, queries: int) -> jax.Array:
    """[P * block, C]: what a block sees of the keys up to its own end, once per query head of a group."""
    position, segment = positions_S[None], segments_S[None]
    mask = causal_mask(position[:, block], position[:, : block.stop], segment[:, block], segment[:, : block.stop])
    return jnp.tile(mask[0], (queries, 1))


def _flat(x_GPS: jax.Array, block: slice) -> jax.Array:
    """A block of [G, P, S, ...] as [G, P * block, ...]: the query heads of a group share their keys."""
    part = x_GPS[:, :, block]
    return part.reshape(part.shape[0], -1, *part.shape[3:])


def _row_forward(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Of one row: the output [G, P, S, H] and the logarithm of the softmax's denominator [G, P, S]."""
    q_GPSH, k_GHS, v_GHS, positions_S, segments_S = row
    outs, log_zs = [], []
    for block in _blocks(k_GHS.shape[2]):
        scores = _product(_flat(q_GPSH, block), k_GHS[..., : block.stop], 2, 1)
        scores = jnp.where(_mask(positions_S, segments_S, block, q_GPSH.shape[1]), scores, _MASKED)
        peak = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        z = weights.sum(-1, keepdims=True)
        out = _product(weights.astype(v_GHS.dtype), v_GHS[..., : block.stop], 2, 2) / z
        outs.append(out.reshape(*q_GPSH.shape[:2], -1, out.shape[-1]).astype(v_GHS.dtype))
        log_zs.append((peak + jnp.log(z)).reshape(*q_GPSH.shape[:2], -1))
    return jnp.concatenate(outs, 2), jnp.concatenate(log_zs, 2)


def _row_backward(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one row: the gradients of q [G, P, S, H], k and v [G, H, S]."""
    q_GPSH, k_GHS, v_GHS, positions_S, segments_S, out_GPSH, log_z_GPS, grad_GPSH = row
    delta_GPS = (grad_GPSH.astype(jnp.float32) * out_GPSH).sum(-1)
    grad_q, grad_k, grad_v = [], jnp.zeros(k_GHS.shape, jnp.float32), jnp.zeros(v_GHS.shape, jnp.float32)
    for block in _blocks(k_GHS.shape[2]):
        q, grad, log_z, delta = (_flat(a, block) for a in (q_GPSH, grad_GPSH, log_z_GPS, delta_GPS))
        k, v = k_GHS[..., : block.stop], v_GHS[..., : block.stop]
        mask = _mask(positions_S, segments_S, block, q_GPSH.shape[1])
        weights = jnp.where(mask, jnp.exp(_product(q, k, 2, 1) - log_z[..., None]), 0)
        grad_scores = (weights * (_product(grad, v, 2, 1) - delta[..., None])).astype(q.dtype)
        grad_q.append(_product(grad_scores, k, 2, 2).reshape(*q_GPSH.shape[:2], -1, q.shape[-1]))
        grad_k = grad_k.at[..., : block.stop].add(_product(q, grad_scores, 1, 1))
        grad_v = grad_v.at[..., : block.stop].add(_product(grad, weights.astype(v.dtype), 1, 1))
    grads = (jnp.concatenate(grad_q, 2), grad_k, grad_v)
    grad_q, grad_k, grad_v = (g.astype(x.dtype) for g, x in zip(grads, (q_GPSH, k_GHS, v_GHS), strict=True))
    return grad_q, grad_k, grad_v


def _grouped(x_BNSH: jax.Array, groups: int) -> jax.Array:
    """[B, G, P, S, H]."""
    return x_BNSH.reshape(x_BNSH.shape[0], groups, -1, *x_BNSH.shape[2:])


def _forward(q_BNHS, k_BGHS, v_BGHS, positions_BS, segments_BS):
    q_BGPSH = _grouped(q_BNHS.swapaxes(2, 3), k_BGHS.shape[1])
    inputs = (q_BGPSH, k_BGHS, v_BGHS, positions_BS, segments_BS)
    # Named here and not outside, as the backward pass needs both.
    out_BGPSH, log_z_BGPS = checkpoint_name(jax.lax.map(_row_forward, inputs), "attention")
    return out_BGPSH.reshape(q_BNHS.swapaxes(2, 3).shape), (*inputs, out_BGPSH, log_z_BGPS)


def _backward(residuals, grad_BNSH):
    grad_q, grad_k, grad_v = jax.lax.map(_row_backward, (*residuals, _grouped(grad_BNSH, residuals[1].shape[1])))
    return grad_q.reshape(grad_BNSH.shape).swapaxes(2, 3), grad_k, grad_v, None, None


blocked_attention.defvjp(_forward, _backward)
