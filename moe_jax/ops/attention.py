"""Causal attention with grouped key/value heads and document segments, in plain JAX.

Legend: B batch, S queries, C keys (the cache's length in generation, else S), N query heads,
G key/value heads, P queries per key/value head (N / G), H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_mask(
    query_positions_BS: jax.Array,
    key_positions_BC: jax.Array,
    query_segments_BS: jax.Array,
    key_segments_BC: jax.Array,
) -> jax.Array:
    """[B, S, C], true where a query may look: same document, not a later position."""
    same = query_segments_BS[:, :, None] == key_segments_BC[:, None, :]
    return same & (query_positions_BS[:, :, None] >= key_positions_BC[:, None, :])


def attention(q_BSNH: jax.Array, k_BCGH: jax.Array, v_BCGH: jax.Array, mask_BSC: jax.Array) -> jax.Array:
    """Softmax attention scaled by 1/sqrt(H), scores and softmax in float32: [B, S, N, H]."""
    batch, length, heads, width = q_BSNH.shape
    q_BSGPH = q_BSNH.reshape(batch, length, k_BCGH.shape[2], -1, width)
    scores = jnp.einsum("bsgph,bcgh->bgpsc", q_BSGPH, k_BCGH, preferred_element_type=jnp.float32)
    # A finite floor: a row of padding sees nothing, and softmax over -inf alone would be NaN.
    scores = jnp.where(mask_BSC[:, None, None], scores * width**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BCGH.dtype)
    out = jnp.einsum("bgpsc,bcgh->bsgph", weights, v_BCGH)
    return out.reshape(batch, length, heads, width)
