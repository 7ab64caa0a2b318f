"""The whole model: tied embedding, a scan over stacked blocks, final norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.attention import Attention, KVCache, Tokens
from moe_jax.model.layers import Compute, GatedFFN, RMSNorm, parameter
from moe_jax.model.moe import MoE, RouterStats
from moe_jax.model.rope import Rotation, rotation
from moe_jax.parallel.mesh import platform
from moe_jax.parallel.vocabulary import look_up, next_token_loss

# What each policy keeps of a layer besides its input. The routing is kept always: it is small, and a second
# rounding of the scores could choose other experts than the forward pass did.
SAVED = {"full": ("routing",), "save_attention": ("routing", "attention"), "save_dispatch": ("routing", "dispatch")}


class Embedding(nnx.Module):
    """The tied table [V, D]: looked up at the bottom, multiplied by at the top."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig):
        shape = (cfg.vocab_size, cfg.d_model)
        self.embedding = parameter(rngs, shape, ("vocab", "embed"), scale=cfg.init_scale, quant_axis=-1)

    def __call__(self, ids_BS: jax.Array, compute: Compute) -> jax.Array:
        """[B, S, D] rows of the table."""
        return look_up(compute.cut(self.embedding), ids_BS, compute.mesh)


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

    def __call__(self, x_BSD, tokens: Tokens, angles: Rotation, compute: Compute, cache: KVCache | None):
        """One layer, on a Block whose stacked parameters were sliced by the scan."""
        mixed, cache = self.attention(self.attention_norm(x_BSD), tokens, angles, compute, cache)
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
        remat: str = "nothing",
    ) -> tuple[jax.Array, RouterStats | None, KVCache | None]:
        """(hidden_BSD, stats stacked over layers or None if dense, updated cache [L, B, C, G, H]).

        `remat` names what the backward pass recomputes: "nothing", or a key of SAVED.
        """
        graph, stacked = nnx.split(self.layers)
        if compute.quant is None:
            stacked = _cast_matrices(stacked, compute.dtype)
        angles = rotation(tokens.positions, self.cfg.rope, self.cfg.head_dim)

        def layer(x_BSD, xs):
            weights, layer_cache = xs
            block = nnx.merge(graph, weights)
            x_BSD, layer_cache, stats = block(x_BSD, tokens, angles, compute, layer_cache)
            return x_BSD, (layer_cache, stats)

        if remat != "nothing":
            saved = jax.checkpoint_policies.save_only_these_names(*SAVED[remat])
            layer = jax.checkpoint(layer, policy=saved, prevent_cse=False)
        x_BSD = compute.hidden(self.embed(ids_BS, compute))
        # On CPU a loop costs: what it saves for the backward pass is zero-filled, copied in and copied out.
        unroll = remat == "nothing" and cache is None and platform(compute.mesh) == "cpu"
        x_BSD, (cache, stats) = jax.lax.scan(layer, x_BSD, (stacked, cache), unroll=unroll)
        return self.final_norm(x_BSD), stats, cache

    def loss(
        self, hidden_BSD: jax.Array, targets_BS: jax.Array, weight_BS: jax.Array, compute: Compute, chunk: int
    ) -> jax.Array:
        """Sum of weight * -log p(target) in nats, with the logits of `chunk` tokens per device at a time."""
        h, table = compute.activation(hidden_BSD), compute.cut(self.embed.embedding)
        return next_token_loss(h, table, targets_BS, weight_BS, compute.mesh, chunk)

    def logits(self, hidden: jax.Array, compute: Compute) -> jax.Array:
        """[..., V] float32. For a few positions: training uses `loss` instead."""
        h, table = compute.activation(hidden), compute.cut(self.embed.embedding)
        return jnp.einsum("...d,vd->...v", h, table, preferred_element_type=jnp.float32)


def _cast_matrices(stacked: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """All layers at once, so that their gradients, which are of this type anyway, are not kept in float32."""

    def cast(variable: nnx.Variable) -> nnx.Variable:
        return variable if variable.quant_axis is None else variable.replace(variable[...].astype(dtype))

    return jax.tree.map(cast, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def empty_cache(cfg: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache [L, B, length, G, H] with nothing in it."""
    shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
