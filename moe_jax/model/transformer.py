"""The whole model: tied embedding, a scan over stacked blocks, final norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.attention import Attention, KVCache, Tokens
from moe_jax.model.layers import Compute, GatedFFN, RMSNorm, parameter
from moe_jax.model.moe import MoE, RouterStats


class Embedding(nnx.Module):
    """The tied table [V, D]: looked up at the bottom, multiplied by at the top."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig):
        shape = (cfg.vocab_size, cfg.d_model)
        self.embedding = parameter(rngs, shape, ("vocab", "embed"), scale=cfg.init_scale, quant_axis=-1)

    def table(self, compute: Compute) -> jax.Array:
        """[V, D] as lookups and the head see it."""
        return compute.weight(self.embedding)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual; parameters of all layers, stacked."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig):
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps, (cfg.num_layers,))
        self.attention = Attention(rngs, cfg)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps, (cfg.num_layers,))
        if cfg.moe is None:
            self.ffn = GatedFFN(rngs, cfg, cfg.ffn_width)
        else:
            self.ffn = MoE(rngs, cfg, cfg.moe)

    def __call__(self, x_BSD, tokens: Tokens, compute: Compute, cache: KVCache | None):
        """One layer, on a Block whose stacked parameters were sliced by the scan."""
        mixed, cache = self.attention(self.attention_norm(x_BSD), tokens, compute, cache)
        x_BSD = compute.hidden(x_BSD + mixed)
        normed = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, stats = self.ffn(normed, tokens.segment_ids > 0, compute)
        else:
            y_BSD, stats = self.ffn(normed, compute), None
        return compute.hidden(x_BSD + y_BSD), cache, stats


class Transformer(nnx.Module):
    """Decoder-only language model (paper section 3). Calls return the normed hidden state, not logits."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig):
        self.embed = Embedding(rngs, cfg)
        self.layers = Block(rngs, cfg)
        self.final_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.cfg = cfg

    def __call__(
        self,
        ids_BS: jax.Array,
        tokens: Tokens,
        compute: Compute,
        *,
        cache: KVCache | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, RouterStats | None, KVCache | None]:
        """(hidden_BSD, stats stacked over layers or None if dense, updated cache [L, B, C, G, H])."""
        graph, stacked = nnx.split(self.layers)

        def layer(x_BSD, xs):
            weights, layer_cache = xs
            block = nnx.merge(graph, weights)
            x_BSD, layer_cache, stats = block(x_BSD, tokens, compute, layer_cache)
            return x_BSD, (layer_cache, stats)

        if remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        x_BSD = compute.hidden(self.embed.table(compute)[ids_BS])
        x_BSD, (cache, stats) = jax.lax.scan(layer, x_BSD, (stacked, cache))
        return self.final_norm(x_BSD), stats, cache

    def head(self, hidden: jax.Array, compute: Compute) -> tuple[jax.Array, jax.Array]:
        """The operands of the head's product: hidden [..., D] and table [V, D]; logits are h @ table.T."""
        return compute.activation(hidden), self.embed.table(compute)

    def logits(self, hidden: jax.Array, compute: Compute) -> jax.Array:
        """[..., V] float32. For a few positions: training uses the chunked cross entropy instead."""
        h, table = self.head(hidden, compute)
        return jnp.einsum("...d,vd->...v", h, table, preferred_element_type=jnp.float32)


def empty_cache(cfg: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache [L, B, length, G, H] with nothing in it."""
    shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
