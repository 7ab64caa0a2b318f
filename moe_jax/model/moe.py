"""Mixture of experts: router, routed experts through a dispatcher, and the shared expert.

Scores, counts and losses are taken in the global view of all tokens; only dispatch, grouped products and
combine run per device (`parallel/dispatch.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.layers import Compute, ExpertBias, GatedFFN, activate, parameter
from moe_jax.ops.grouped_matmul import grouped_matmul, implementation_for
from moe_jax.parallel.dispatch import through_experts
from moe_jax.parallel.mesh import platform


class RouterStats(NamedTuple):
    """Per layer, over the real (not padding) tokens of a batch; stacked [L, ...] by the layer scan."""

    counts_E: jax.Array  # int32 pairs sent to each expert, before any drop
    dropped: jax.Array  # int32 pairs that were not computed
    z_loss: jax.Array  # mean over tokens of logsumexp(logits)^2
    aux_loss: jax.Array  # E * sum_e fraction_e * probability_e; 1 when balanced


class Router(nnx.Module):
    """Float32 scores, a bias that takes part in the selection only, renormalised weights."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig, moe: MoEConfig):
        shape = (cfg.num_layers, cfg.d_model, moe.num_experts)
        self.kernel = parameter(rngs, shape, ("layers", "embed", "router"), scale=cfg.init_scale)
        self.bias = ExpertBias(
            jnp.zeros((cfg.num_layers, moe.num_experts)), axes=("layers", "router"), quant_axis=None
        )
        self.moe = moe

    def __call__(self, x_BSD: jax.Array, real_BS: jax.Array):
        """(ids_BSK with num_experts at padding, weights_BSK float32, stats without drops)."""
        moe = self.moe
        logits = jnp.einsum(
            "bsd,de->bse", x_BSD.astype(jnp.float32), self.kernel[...],
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        sigmoid = moe.score_func == "sigmoid"
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
        biased = scores + self.bias[...] if moe.use_expert_bias else scores
        # top_k puts the lower index first among equals, as every deployed form does.
        ids_BSK = jax.lax.top_k(jax.lax.stop_gradient(biased), moe.num_experts_per_tok)[1]
        weights = jnp.take_along_axis(scores, ids_BSK, axis=-1)
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        ids_BSK = jnp.where(real_BS[..., None], ids_BSK, moe.num_experts)
        stats = self._stats(logits, scores, ids_BSK, real_BS)
        return ids_BSK, weights * moe.routed_scaling_factor, stats

    def _stats(self, logits, scores, ids_BSK, real_BS) -> RouterStats:
        experts, per_token = self.moe.num_experts, self.moe.num_experts_per_tok
        counts_E = jnp.zeros(experts, jnp.int32).at[ids_BSK.reshape(-1)].add(1, mode="drop")
        tokens = jnp.maximum(real_BS.sum(), 1).astype(jnp.float32)
        z_loss = (jax.nn.logsumexp(logits, axis=-1) ** 2 * real_BS).sum() / tokens
        shares = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        probability_E = (shares * real_BS[..., None]).sum((0, 1)) / tokens
        fraction_E = counts_E / (tokens * per_token)
        aux_loss = experts * (fraction_E * probability_E).sum()
        return RouterStats(counts_E, jnp.int32(0), z_loss, aux_loss)


class Experts(nnx.Module):
    """The routed experts' weights: `gate_up` [L, E, D, 2F] (gate columns first), `down` [L, E, F, D]."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig, moe: MoEConfig):
        layers, experts, model, width = (cfg.num_layers, moe.num_experts, cfg.d_model, moe.expert_width)
        self.gate_up = parameter(
            rngs, (layers, experts, model, 2 * width), ("layers", "expert", "embed", "expert_mlp"),
            scale=cfg.init_scale, quant_axis=-2,
        )  # fmt: skip
        self.down = parameter(
            rngs, (layers, experts, width, model), ("layers", "expert", "expert_mlp", "embed"),
            scale=cfg.output_init_scale, quant_axis=-2,
        )  # fmt: skip
        self.activation = cfg.activation

    def weights(self, compute: Compute) -> tuple[jax.Array, jax.Array]:
        """Gate|up and down as the products see them; quantised before any gather, expert by expert."""
        return compute.weight(self.gate_up), compute.weight(self.down)

    def rows(self, implementation: str, compute: Compute):
        """The function of (rows_RD sorted by expert, group_sizes_E, gate_up, down) for the dispatcher."""

        def run(rows_RD, sizes_E, gate_up_EDF, down_EFD):
            pair = grouped_matmul(rows_RD, gate_up_EDF, sizes_E, implementation=implementation)
            gate, up = jnp.split(pair, 2, axis=-1)
            hidden = compute.activation(activate(self.activation, gate) * up)
            return grouped_matmul(hidden, down_EFD, sizes_E, implementation=implementation)

        return run


class MoE(nnx.Module):
    """routed(x) + shared(x)."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig, moe: MoEConfig):
        self.router = Router(rngs, cfg, moe)
        self.experts = Experts(rngs, cfg, moe)
        width = moe.shared_expert_width
        self.shared = GatedFFN(rngs, cfg, width) if width else None
        self.moe = moe

    def __call__(self, x_BSD: jax.Array, real_BS: jax.Array, compute: Compute) -> tuple[jax.Array, RouterStats]:
        """The feed-forward of one layer; `real_BS` is false at padding."""
        ids_BSK, mix_BSK, stats = self.router(x_BSD, real_BS)
        y_BSD, kept = through_experts(
            self.experts.rows(implementation_for(platform(compute.mesh)), compute),
            self.experts.weights(compute),
            compute.activation(x_BSD),
            ids_BSK,
            mix_BSK,
            self.moe,
            compute.mesh,
        )
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD, compute)
        return y_BSD, stats._replace(dropped=stats.counts_E.sum() - kept)
