"""Grouped-query attention with weightless QK norm and interleaved RoPE, with or without a KV cache.

Legend: B batch, S sequence, C keys, D model, N query heads, G key/value heads, H head width. Queries, keys
and values are [.., H, S]: sums over a head's width then add whole rows, and no lane of a TPU is left empty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from moe_jax.config import ModelConfig
from moe_jax.model.layers import Compute, Linear
from moe_jax.model.rope import Rotation, halves_first
from moe_jax.ops.attention import attention, blocked_attention, causal_mask
from moe_jax.ops.rotary import prepare_heads, prepare_heads_fused
from moe_jax.parallel.mesh import platform
from moe_jax.parallel.product import product
from moe_jax.parallel.rules import BATCH_AXES, spec
from moe_jax.parallel.splash import splash_attention

HEADS = ("batch", "heads", "width", "sequence")


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
        self, x_BSD: jax.Array, tokens: Tokens, angles: Rotation, compute: Compute, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """With `cache`, the new keys and values are written at `positions` and all earlier ones are seen."""
        cfg = self.cfg
        x_BSD = compute.activation(x_BSD)
        q, k, v = (self._heads(x_BSD, linear, compute) for linear in (self.q, self.k, self.v))
        q = self._rotated(q, angles, compute.mesh, cfg.head_dim**-0.5)
        k = self._rotated(k, angles, compute.mesh, 1.0)
        if cache is None:
            out_BNSH = self._uncached(q, k, v, tokens, compute.mesh)
        else:
            out_BNSH, cache = self._cached(q, k, v, tokens, cache)
        return self._output(out_BNSH, compute), cache

    def _uncached(self, q, k, v, tokens: Tokens, mesh: Mesh) -> jax.Array:
        if platform(mesh) == "tpu":
            return splash_attention(q, k, v, tokens.segment_ids, mesh)
        if mesh.shape["context"] == 1 and mesh.shape["tensor"] == 1:
            rows = PartitionSpec(BATCH_AXES)
            blocked = jax.shard_map(blocked_attention, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
            return blocked(q, k, v, *tokens)
        mask = causal_mask(tokens.positions, tokens.positions, tokens.segment_ids, tokens.segment_ids)
        return checkpoint_name(attention(q, k, v, mask), "attention")

    def _cached(self, q, k, v, tokens: Tokens, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One document per row: what lies beyond the query's position is not written yet, or older."""
        rows = jnp.arange(q.shape[0])[:, None]
        cache = KVCache(
            cache.k_BCGH.at[rows, tokens.positions].set(k.transpose(0, 3, 1, 2)),
            cache.v_BCGH.at[rows, tokens.positions].set(v.transpose(0, 3, 1, 2)),
        )
        k, v = (a.transpose(0, 2, 3, 1) for a in cache)
        places = jnp.broadcast_to(jnp.arange(k.shape[-1]), (k.shape[0], k.shape[-1]))
        mask = causal_mask(tokens.positions, places, tokens.segment_ids, jnp.ones_like(places))
        return attention(q, k, v, mask), cache

    def _heads(self, x_BSD: jax.Array, linear: Linear, compute: Compute) -> jax.Array:
        w_DNH = compute.cut(linear.kernel).reshape(x_BSD.shape[-1], -1, self.cfg.head_dim)
        return product(
            "bsd,dnh->bnhs", x_BSD, w_DNH if linear is self.v else halves_first(w_DNH), compute.mesh,
            ("batch", "sequence", "activation"), ("embed", "heads", "width"), HEADS,
        )  # fmt: skip

    def _rotated(self, x_BNHS: jax.Array, angles: Rotation, mesh: Mesh, scale: float) -> jax.Array:
        eps = self.cfg.norm_eps if self.cfg.qk_norm else None
        if platform(mesh) != "tpu":
            return prepare_heads(x_BNHS, *angles, eps, scale)
        by_token = spec(("batch", "width", "sequence"))
        return jax.shard_map(
            lambda x, cos, sin: prepare_heads_fused(x, cos, sin, eps, scale),
            mesh=mesh, in_specs=(spec(HEADS), by_token, by_token), out_specs=spec(HEADS), check_vma=False,
        )(x_BNHS, *angles)  # fmt: skip

    def _output(self, out_BNSH: jax.Array, compute: Compute) -> jax.Array:
        batch, heads, length, width = out_BNSH.shape
        # The row that INT8 emulation rounds is a token's whole vector; without it these reshapes cancel.
        rows = compute.activation(out_BNSH.swapaxes(1, 2).reshape(batch, length, -1))
        out_BNSH = rows.reshape(batch, length, heads, width).swapaxes(1, 2)
        w_NHD = compute.cut(self.o.kernel).reshape(heads, width, -1)
        return product(
            "bnsh,nhd->bsd", out_BNSH, w_NHD, compute.mesh,
            ("batch", "heads", "sequence", "width"), ("heads", "width", "embed"),
            ("batch", "sequence", "activation"),
        )  # fmt: skip
