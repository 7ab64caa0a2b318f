"""Mixture of experts: router, routed experts through a dispatcher, and the shared expert.

Scores, counts and losses are taken in the global view of all tokens; only dispatch, grouped products and
combine run per device (`parallel/dispatch.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.layers import Compute, ExpertBias, GatedFFN, parameter
from moe_jax.ops.gating import gate_rows, gate_rows_fused
from moe_jax.ops.grouped_matmul import grouped_matmul, implementation_for, row_alignment
from moe_jax.parallel.dispatch import through_experts
from moe_jax.parallel.mesh import platform
from moe_jax.parallel.product import product


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

    def __call__(
        self, x_BSD: jax.Array, real_BS: jax.Array, mesh: Mesh
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """(ids_BSK with num_experts at padding, routing_BSK float32 weights, stats without drops)."""
        moe = self.moe
        logits = product(
            "bsd,de->bse", x_BSD.astype(jnp.float32), self.kernel[...], mesh,
            ("batch", "sequence", "activation"), ("embed", "router"), ("batch", "sequence", "router"),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        sigmoid = moe.score_func == "sigmoid"
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
        biased = scores + self.bias[...] if moe.use_expert_bias else scores
        ids_KBS = top_ids(jax.lax.stop_gradient(biased), moe.num_experts_per_tok)
        # Saved in the smallest type, and choice by choice: TPUs would pad a last axis of K to 128 lanes.
        small = jnp.uint8 if moe.num_experts < 256 else jnp.int32
        ids_KBS = checkpoint_name(ids_KBS.astype(small), "routing").astype(jnp.int32)
        ids_BSK = jnp.moveaxis(ids_KBS, 0, -1)
        chosen_BSKE = ids_BSK[..., None] == jnp.arange(moe.num_experts)
        weights = jnp.where(chosen_BSKE, scores[..., None, :], 0).sum(-1)
        if moe.norm_topk_prob:
            weights = normalised(weights)
        ids_BSK = jnp.where(real_BS[..., None], ids_BSK, moe.num_experts)
        stats = self._stats(logits, scores, ids_BSK, real_BS)
        return ids_BSK, weights * moe.routed_scaling_factor, stats

    def _stats(self, logits, scores, ids_BSK, real_BS) -> RouterStats:
        experts, per_token = self.moe.num_experts, self.moe.num_experts_per_tok
        counts_E = (ids_BSK.reshape(-1, 1) == jnp.arange(experts)).sum(0, dtype=jnp.int32)
        tokens = jnp.maximum(real_BS.sum(), 1).astype(jnp.float32)
        z_loss = (jax.nn.logsumexp(logits, axis=-1) ** 2 * real_BS).sum() / tokens
        shares = normalised(scores)
        probability_E = (shares * real_BS[..., None]).sum((0, 1)) / tokens
        fraction_E = counts_E / (tokens * per_token)
        aux_loss = experts * (fraction_E * probability_E).sum()
        return RouterStats(counts_E, jnp.int32(0), z_loss, aux_loss)


def normalised(scores: jax.Array) -> jax.Array:
    """Scores, none negative, over the sum of the last axis and the 1e-20 that the published model adds to it.

    The gradient of a quotient has the square of its divisor in it, which float32 loses below 1e-19: sigmoids of a
    token that no expert wants. So all of it is first multiplied by the power of two that brings the largest score
    near 1, which changes no bits.
    """
    most = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    factor = jnp.ldexp(jnp.float32(1), -jnp.frexp(jnp.maximum(most, 2.0**-126))[1])
    near_one = scores * factor
    return near_one / (near_one.sum(-1, keepdims=True) + 1e-20 * factor)


def top_ids(scores: jax.Array, count: int) -> jax.Array:
    """The indices of the `count` largest of the last axis, int32 [count, ...]; the lower first among equals.

    For a handful out of some dozens, one maximum after the other is much cheaper than a sort, on any device;
    and every deployed form breaks ties this way.
    """
    index = jnp.arange(scores.shape[-1])
    picked = []
    for _ in range(count):
        best = jnp.argmax(scores, axis=-1)
        picked.append(best)
        scores = jnp.where(index == best[..., None], -jnp.inf, scores)
    return jnp.stack(picked).astype(jnp.int32)


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
        return compute.cut(self.gate_up), compute.cut(self.down)

    def rows(self, implementation: str, compute: Compute):
        """The dispatcher's function of (rows_RD sorted by expert, routing_R, sizes_E, gate_up, down [E, D, F]).

        The weight of a row multiplies the input of the down product instead of its output: the same by
        linearity, on half as many columns, and its gradient falls out of the activation's pass.
        """

        quantized = compute.quant is not None and compute.quant.quantize_activations

        def gated(gate_up_R2F, routing_R):
            if quantized:  # INT8 rows are rounded before the weight, as the deployed product does
                plain = gate_rows(gate_up_R2F, jnp.ones_like(routing_R), self.activation)
                return (compute.activation(plain) * routing_R[:, None]).astype(gate_up_R2F.dtype)
            gate = gate_rows_fused if implementation == "megablox" else gate_rows
            return gate(gate_up_R2F, routing_R, self.activation)

        def run(rows_RD, routing_R, sizes_E, gate_up_ED2F, down_EDF):
            gate_up_R2F = grouped_matmul(rows_RD, gate_up_ED2F, sizes_E, implementation=implementation)
            return grouped_matmul(
                gated(gate_up_R2F, routing_R), down_EDF, sizes_E, implementation=implementation, transpose_rhs=True
            )  # fmt: skip

        return run


@jax.custom_vjp
def _one_after_the_other(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both unchanged; the gradient of `y` waits for that of `x`.

    So the backward pass ends the shared expert before it begins the routed ones, and the largest arrays of
    the two are not in memory together.
    """
    return x, y


_one_after_the_other.defvjp(lambda x, y: ((x, y), None), lambda _, grads: jax.lax.optimization_barrier(grads))


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
        ids_BSK, routing_BSK, stats = self.router(x_BSD, real_BS, compute.mesh)
        implementation = implementation_for(platform(compute.mesh))
        y_BSD, kept = through_experts(
            self.experts.rows(implementation, compute),
            self.experts.weights(compute),
            compute.activation(x_BSD),
            ids_BSK,
            routing_BSK,
            self.moe,
            compute.mesh,
            row_alignment(implementation),
        )
        if self.shared is not None:
            x_BSD, y_BSD = _one_after_the_other(x_BSD, y_BSD)
            y_BSD = y_BSD + self.shared(x_BSD, compute)
        return y_BSD, stats._replace(dropped=stats.counts_E.sum() - kept)
