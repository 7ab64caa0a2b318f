"""Grouped-query attention with weightless QK norm and interleaved RoPE, with or without a KV cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.layers import Compute, Linear, rms_normalize
from moe_jax.model.rope import apply_rope
from moe_jax.ops.attention import attention, causal_mask


class Tokens(NamedTuple):
    """What the layers know of the batch besides the hidden state; each [B, S] int32."""

    positions: jax.Array  # restart at 0 in each document
    segment_ids: jax.Array  # 0 is padding


class KVCache(NamedTuple):
    """Keys and values of one layer (or stacked [L, ...]) by absolute position, zeros where none was written."""

    k_BCGH: jax.Array
    v_BCGH: jax.Array


class Attention(nnx.Module):
    """Causal attention within each document."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig):
        heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        model, layers, scale = cfg.d_model, cfg.num_layers, cfg.init_scale
        self.q = Linear(rngs, layers, (model, heads), ("embed", "heads"), scale)
        self.k = Linear(rngs, layers, (model, kv), ("embed", "heads"), scale)
        self.v = Linear(rngs, layers, (model, kv), ("embed", "heads"), scale)
        self.o = Linear(rngs, layers, (heads, model), ("heads", "embed"), cfg.output_init_scale)
        self.cfg = cfg

    def __call__(
        self, x_BSD: jax.Array, tokens: Tokens, compute: Compute, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """With `cache`, the new keys and values are written at `positions` and all earlier ones are seen."""
        cfg = self.cfg
        q, k, v = (
            linear(x_BSD, compute).reshape(*x_BSD.shape[:2], -1, cfg.head_dim)
            for linear in (self.q, self.k, self.v)
        )
        if cfg.qk_norm:
            q, k = (rms_normalize(a, cfg.norm_eps) for a in (q, k))
        q, k = (apply_rope(a, tokens.positions, cfg.rope).astype(v.dtype) for a in (q, k))
        key_positions, key_segments = tokens.positions, tokens.segment_ids
        if cache is not None:
            rows = jnp.arange(x_BSD.shape[0])[:, None]
            k = cache.k_BCGH.at[rows, tokens.positions].set(k)
            v = cache.v_BCGH.at[rows, tokens.positions].set(v)
            cache = KVCache(k, v)
            # One document per row: what lies beyond the query's position is not written yet, or older.
            key_positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
            key_segments = jnp.ones_like(key_positions)
        mask = causal_mask(tokens.positions, key_positions, tokens.segment_ids, key_segments)
        out = attention(q, k, v, mask)
        return self.o(out.reshape(*x_BSD.shape[:2], -1), compute), cache
